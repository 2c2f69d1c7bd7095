"""The GPU acceptance: correctness, then the times of realistic shapes, within a lease of minutes.

Its stages (``stages.py``) follow each other by how much they tell. Each is stopped at its limit;
one that no longer fits is left out by name; what was recorded by then stays. ``--rehearse`` does
the same with tiny shapes on the CPU; its figures mean nothing and are marked as quick.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .floors import H100, Peaks, floor_table
from .records import Keeper
from .stages import STAGES, SUITE, Order, Stage, check_record, command_of, keep, last_line
from .targets import findings, unmeasured

Record = dict[str, Any]

# Tuning would compile every kernel two or three times.
_FIXED = {"DREAM_KERNELS_TUNE": "0"}
_INTERPRETER = {"TRITON_INTERPRET": "1"}
# A stage that is told to stop may still write.
_GRACE_SECONDS = 5.0


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


def chosen_stages(names: Sequence[str]) -> list[Stage]:
    """Stages by name, in their own order; all by default.

    Raises:
        ValueError: there is none of that name.
    """
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {unknown[0]!r}")
    return [stage for name, stage in STAGES.items() if not names or name in names]


def run_acceptance(
    stages: Sequence[Stage],
    order: Order,
    *,
    minutes: float,
    cache: Path | None,
    say: Callable[[str], None],
    command: Callable[[Stage, Order, Path], list[str]] = command_of,
) -> None:
    """Run the stages that fit into the time.

    Args:
        stages: in this order.
        order: what each is told; its ``seconds`` become the stage's own.
        minutes: of all stages together.
        cache: folder of compiled Triton kernels, which ``compile-ahead`` fills; None for an empty
            one, which is filled beside the first stage.
        say: called with progress messages.
        command: of a stage.
    """
    deadline = time.monotonic() + 60 * minutes
    begin = check_record(
        order,
        "acceptance",
        "ok",
        f"{minutes:g} minutes for {', '.join(s.name for s in stages)}",
        0.0,
    )
    # Records of an earlier acceptance stay only where a part of it is done again.
    Keeper(Path(order.output), SUITE, part=len(stages) < len(STAGES)).add([begin])
    with ExitStack() as stack:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        extra = {**_FIXED, "TRITON_CACHE_DIR": str(folder)}
        extra |= _INTERPRETER if order.rehearse else {}
        if cache is None and not order.rehearse:
            stack.enter_context(_compiling(folder))
        for stage in stages:
            left = deadline - time.monotonic()
            if left < stage.least:
                status, seconds = "refused", 0.0
                said = f"left out: it needs {stage.least:.0f} s, {max(0.0, left):.0f} are left"
            else:
                limit = min(stage.seconds, left)
                say(f"{stage.name}: {stage.shows}, at most {limit:.0f} s")
                own = replace(order, seconds=limit)
                status, said, seconds = run_stage(stage, own, extra, command)
            say(f"{stage.name}: {status}, {said} ({seconds:.0f} s)")
            keep(order, [check_record(order, stage.name, status, said, seconds)])


def run_stage(
    stage: Stage,
    order: Order,
    extra: Mapping[str, str],
    command: Callable[[Stage, Order, Path], list[str]] = command_of,
) -> tuple[str, str, float]:
    """Status, line and seconds of one stage; it is killed with its children at its limit."""
    environment = {
        **os.environ,
        **extra,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    with tempfile.TemporaryDirectory() as folder:
        said, errors = Path(folder) / "said", Path(folder) / "errors"
        start = time.monotonic()
        with (
            errors.open("w") as stream,
            _group(command(stage, order, said), environment, stream) as process,
        ):
            try:
                code: int | None = process.wait(order.seconds)
            except subprocess.TimeoutExpired:
                code = None
        seconds = time.monotonic() - start
        line = said.read_text(encoding="utf-8") if said.is_file() else ""
        if code == 0:
            return "ok", line, seconds
        if code is None:
            return (
                "failed",
                f"stopped after {order.seconds:.0f} s; its records until then stay",
                seconds,
            )
        if not line:
            line = f"exit status {code}: {last_line(errors.read_text(errors='replace'))}"
        refused = line.endswith("is not installed")
        return "refused" if refused else "failed", line, seconds


@contextmanager
def _group(
    command: list[str], environment: Mapping[str, str], errors: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose whole group ends with the block."""
    process = subprocess.Popen(
        command, env=dict(environment), stderr=errors, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _compiling(cache: Path) -> Iterator[None]:
    """Compile the kernels of all stages into ``cache``, on the processors, beside the block."""
    major, minor = torch.cuda.get_device_capability()
    command = [
        sys.executable, "-m", f"{__package__}.compile_ahead", f"sm_{major}{minor}", str(cache),
        str(os.cpu_count() or 1),
    ]  # fmt: skip
    with open(os.devnull, "w") as nothing, _group(command, os.environ, nothing):
        yield


def summary(records: list[Record]) -> list[list[str]]:
    """The short table at the end: checks, then every target with its bound."""
    met = {"ok": "yes", "refused": "not run"}
    rows = [
        [r["peer"], "passes", r["said"][:72], met.get(r["status"], "**no**")]
        for r in records
        if r["suite"] == "gpu tests" and not (r["status"] == "ok" and ": " in r["peer"])
    ]
    rows += [finding.row() for finding in findings(records)]
    return rows + [[claim, "", "not measured", "**no**"] for claim in unmeasured(records)]


def measured_floors(records: list[Record]) -> str | None:
    """The floors, counted with the ceilings that were measured on this device; None without."""
    timed = next((r for r in records if r.get("ceilings")), None)
    if timed is None:
        return None
    ceilings, device = timed["ceilings"], timed["environment"]["device"]
    peaks = Peaks(
        f"{device}, measured", max(ceilings["gemm"].values()), ceilings["copy"], H100.exponentials
    )
    return floor_table(peaks)
