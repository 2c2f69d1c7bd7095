"""Peak memory of a call beyond its inputs and outputs.

On a GPU PyTorch's allocator counts. On a CPU kernels allocate outside PyTorch, so a fresh process
runs the call once and reads the peak of its resident memory from Linux, with an allocator
that returns memory at once; other systems have no figure.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTERS, Prepared
from .cases import Case, from_record, make_inputs
from .check import run

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_TIMEOUT_SECONDS = 240


def available_bytes(device: torch.device) -> int:
    """Memory that a peer may use: what is free on a GPU, two thirds of what Linux has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 2**62
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 * 2 // 3


def gpu_peak_bytes(prepared: Prepared) -> int:
    """Peak of one forward and backward beyond inputs, output and gradients."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(prepared)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(results.values())


def cpu_peak_bytes(case: Case, names: Sequence[str], threads: int) -> dict[str, int | None]:
    """Peak bytes of every named peer beyond inputs, output and gradients; None where unknown."""
    peaks: dict[str, int | None] = dict.fromkeys(names)
    if not measurable():
        return peaks
    left = list(names)
    while left:
        # If the system kills a peer, its process is lost; the other peers get a new one.
        done = _spawn(case, left, threads)
        peaks.update(done)
        left = left[len(done) + 1 :]
    return peaks


def measurable() -> bool:
    """Whether this system reports a process's peak memory and can reset it."""
    return _STATUS.is_file() and os.access(_CLEAR, os.W_OK)


def spawn_environment() -> dict[str, str]:
    """Environment of a process that returns freed memory to the system at once."""
    return {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        # The packages that this process sees, wherever they are.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


class PeakMemory:
    """Resident memory of this process above ``before``, that at the moment of construction."""

    def __init__(self) -> None:
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        _CLEAR.write_text("5")  # resets the peak
        self.before = _resident("VmRSS")

    def bytes(self) -> int:
        """The peak since construction."""
        return max(0, _resident("VmHWM") - self.before)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def _spawn(case: Case, names: Sequence[str], threads: int) -> dict[str, int]:
    command = [sys.executable, "-m", f"{__package__}.memory", json.dumps(case.record())]
    process = subprocess.run(
        [*command, str(threads), *names], env=spawn_environment(), capture_output=True, text=True,
        timeout=_TIMEOUT_SECONDS * len(names), check=False,
    )  # fmt: skip
    done = {}
    for name, line in zip(names, process.stdout.splitlines()):
        done[name] = json.loads(line)
    return done


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _worker(case: Case, threads: int, names: Sequence[str]) -> None:
    torch.set_num_threads(threads)
    # Code and threads loaded by the first call are not the call's own memory.
    warm_case = replace(case, batch=1)
    for name in names:
        warm = ADAPTERS[name].setup(make_inputs(warm_case))
        assert isinstance(warm, Prepared)
        run(warm)
        prepared = ADAPTERS[name].setup(make_inputs(case))
        assert isinstance(prepared, Prepared)
        del warm
        memory = PeakMemory()
        results = run(prepared)
        peak = memory.bytes() - _bytes(results.values())
        print(json.dumps(max(0, peak)), flush=True)
        del prepared, results


if __name__ == "__main__":
    _worker(from_record(json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
