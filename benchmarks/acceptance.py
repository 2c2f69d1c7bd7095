"""The GPU acceptance: the tests on the device, then the times of realistic shapes.

``--rehearse`` does the same with tiny shapes on the CPU, to try the command without a GPU; its
figures mean nothing and are marked as quick.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import Case, gpu_cases, rehearsal_cases
from .environment import provenance
from .floors import Peaks, floor_table
from .kernel import Settings, run_kernel
from .records import SCHEMA
from .targets import findings, unmeasured

Record = dict[str, Any]

# The peers of the acceptance; the floor is the flash kernel without scores.
PEERS = (
    "ours (cuda)", "ours (triton)", "ours (cpu)", "eager", "sdpa, no scores, expanded",
    "sdpa, no scores, grouped", "sdpa, dense mask", "sdpa, extra channel", "flex_attention",
)  # fmt: skip
PEERS_GRADIENTS = ("query", "scores")
_TEST_SECONDS = 1800
_SANITIZERS = ("memcheck", "racecheck")
# Where the CUDA toolkit installs them, often without adding it to PATH.
_CUDA_TOOLS = "/usr/local/cuda/bin"
# A sanitizer makes a kernel a hundred times slower: one small forward and backward of each kind.
_SANITIZED = f"{__package__}.sanitized"
_COLD = f"{__package__}.cold"
# Each process spends most of its time compiling its own kernels.
_TEST_PROCESSES = 8


def require_gpu() -> None:
    """Raise unless there is a GPU.

    Raises:
        ValueError: there is none; the message says what to do.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"gpu-acceptance needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none; "
            "--rehearse walks the same way with tiny shapes on the CPU"
        )


def run_acceptance(
    settings: Settings,
    *,
    rehearse: bool,
    checks: bool,
    wanted: str,
    say: Callable[[str], None],
    show: Callable[[list[Record]], object],
) -> list[Record]:
    """Run tests and times.

    Args:
        settings: of the timing.
        rehearse: tiny shapes, no GPU.
        checks: whether to run tests and sanitizers, too.
        wanted: only cases whose name contains this.
        say: called with progress messages.
        show: called with the records of each case.
    """
    cases = [c for c in (rehearsal_cases() if rehearse else gpu_cases()) if wanted in c.name]
    if not cases:
        raise ValueError(f"no case has {wanted!r} in its name")
    records = _run_checks(settings, rehearse, say) if checks else []
    if records:
        show(records)
    say(f"timing {len(cases)} cases")

    def peers(case: Case) -> Sequence[str]:
        """The peers race where their targets are; the other backwards are compared with ours."""
        if case.gradients == PEERS_GRADIENTS:
            return settings.peers
        return [name for name in settings.peers if name.startswith("ours")]

    return records + run_kernel(cases, settings, show, "acceptance", peers)


def summary(records: list[Record]) -> list[list[str]]:
    """The short table at the end: checks, then every target with its bound."""
    met = {"ok": "yes", "refused": "not run"}
    rows = [
        [r["peer"], "passes", r["said"][:72], met.get(r["status"], "**no**")]
        for r in records
        if r["suite"] == "gpu tests"
    ]
    rows += [finding.row() for finding in findings(records)]
    return rows + [[claim, "", "not measured", "**no**"] for claim in unmeasured(records)]


def measured_floors(records: list[Record]) -> str:
    """The floors, counted with the ceilings that were measured on this device."""
    timed = next(r for r in records if r["suite"] == "acceptance")
    ceilings, device = timed["ceilings"], timed["environment"]["device"]
    from .floors import H100

    peaks = Peaks(
        f"{device}, measured", max(ceilings["gemm"].values()), ceilings["copy"], H100.exponentials
    )
    return floor_table(peaks)


def _run_checks(settings: Settings, rehearse: bool, say: Callable[[str], None]) -> list[Record]:
    environment = provenance(settings.device)
    records = []
    with tempfile.TemporaryDirectory() as cache:
        for name, command, extra in _checks(rehearse, cache):
            say(f"{name}: {' '.join(command)}")
            status, said, seconds = _run(command, extra)
            say(f"{name}: {status}, {said} ({seconds:.0f} s)")
            records.append(
                {
                    "schema": SCHEMA,
                    "suite": "gpu tests",
                    "quick": settings.quick,
                    "environment": environment,
                    "peer": name,
                    "status": status,
                    "reason": None if status == "ok" else said,
                    "command": command,
                    "seconds": seconds,
                    "said": said,
                }
            )
    return records


def _checks(rehearse: bool, cache: str) -> list[tuple[str, list[str], Mapping[str, str]]]:
    """Name, command and environment of every check; ``cache`` is an empty folder."""
    tests = Path(__file__).resolve().parents[1] / "tests" / "kernels"
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(tests)]
    if rehearse:
        # The real command collects; the tests themselves run in `make test`.
        pytest += ["--collect-only"]
    elif importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(min(_TEST_PROCESSES, os.cpu_count() or 1))]
    # The interpreter is slow, so a rehearsal runs two cases.
    device = "cpu" if rehearse else "cuda"
    arguments = [device, "2"] if rehearse else [device]
    interpreter = {"TRITON_INTERPRET": "1"} if rehearse else {}
    # Tuning would compile every kernel of these two or three times.
    fixed = {"DREAM_KERNELS_TUNE": "0", **interpreter}
    small = [sys.executable, "-m", _SANITIZED, *arguments]
    checks: list[tuple[str, list[str], Mapping[str, str]]] = [
        ("tests", pytest, {} if rehearse else fixed),
        ("small shapes", small, fixed),
    ]
    for tool in _SANITIZERS:
        # PyTorch's caching allocator hides reads beyond a tensor from the sanitizer.
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **fixed}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small]
        checks.append((f"compute-sanitizer {tool}", command, extra))
    cold = [sys.executable, "-m", _COLD, device]
    kept = {"TRITON_CACHE_DIR": cache, **interpreter}
    return [*checks, ("cold first call", cold, kept), ("first call, compiled before", cold, kept)]


def _run(command: list[str], extra: Mapping[str, str]) -> tuple[str, str, float]:
    """Status, last line or reason, and seconds of one check."""
    path = os.pathsep.join((os.environ.get("PATH", ""), _CUDA_TOOLS))
    program = shutil.which(command[0], path=path)
    if program is None:
        return "refused", f"{command[0]} is not installed", 0.0
    environment = {
        **os.environ,
        **extra,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    start = time.monotonic()
    try:
        process = subprocess.run(
            [program, *command[1:]], env=environment, capture_output=True, text=True,
            timeout=_TEST_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "failed", f"took more than {_TEST_SECONDS} s", time.monotonic() - start
    seconds = time.monotonic() - start
    said = process.stdout if process.returncode == 0 else process.stdout + process.stderr
    lines = [x for x in said.splitlines() if x.strip()]
    last = lines[-1].strip()[:200] if lines else "it said nothing"
    if process.returncode == 0:
        return "ok", last, seconds
    return "failed", f"exit status {process.returncode}: {last}", seconds
