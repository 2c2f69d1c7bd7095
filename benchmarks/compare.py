"""Two commits on one machine: the base is built in its own worktree, and the runs alternate.

Each round starts one process per commit, which times a few cases, so a drift of the machine
affects both. Both use the suite of this checkout; only the packages differ.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .adapters import ADAPTERS, Prepared
from .cases import Case, Inputs, from_record, make_inputs
from .ceilings import Ceilings
from .check import Oracle, check_case
from .environment import commit, provenance
from .kernel import figures
from .measure import Clock, Times, race
from .records import SCHEMA

Record = dict[str, Any]

_BUILD_SECONDS, _ROUND_SECONDS = 600, 300
_RUNS_A_ROUND = 3


def checkout() -> Path:
    """The root of the checkout that contains this package.

    Raises:
        ValueError: it is not in a checkout.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        raise ValueError("--base needs git and a checkout; this package is installed elsewhere")
    return root


@contextmanager
def built_worktree(revision: str, say: Callable[[str], None]) -> Iterator[tuple[Path, str]]:
    """A worktree of a revision with its native extension; yields it and the commit's short name.

    Raises:
        ValueError: there is no such revision, or it does not build.
    """
    root = checkout()
    found = _git(root, "rev-parse", "--short=12", "--verify", f"{revision}^{{commit}}")
    if found.returncode:
        raise ValueError(f"git knows no revision {revision!r}")
    name = found.stdout.strip()
    folder = Path(tempfile.mkdtemp(prefix="dream-base-"))
    try:
        added = _git(root, "worktree", "add", "--detach", str(folder / "tree"), name)
        if added.returncode:
            raise ValueError(f"git could not check {revision} out: {added.stderr.strip()}")
        say(f"building {name}")
        built = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder / "tree",
            capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False,
        )  # fmt: skip
        if built.returncode:
            raise ValueError(f"{name} does not build: {built.stderr.strip()[-400:]}")
        yield folder / "tree", name
    finally:
        _git(root, "worktree", "remove", "--force", str(folder / "tree"))
        shutil.rmtree(folder, ignore_errors=True)


def compare_revisions(
    base: str, cases: Sequence[Case], device: torch.device, rounds: int, say: Callable[[str], None]
) -> list[Record]:
    """Time ``cases`` with the base and with this checkout, alternating.

    Returns:
        Two records for each case, the base's first; ``ratio`` is a time over the base's.
    """
    here = checkout()
    with built_worktree(base, say) as (tree, name):
        trees = {name: tree, f"{commit() or 'here'} (this checkout)": here}
        times: dict[str, list[Times]] = {key: [Times() for _ in cases] for key in trees}
        peers: dict[str, list[str]] = {}
        for number in range(rounds):
            order = list(trees) if number % 2 == 0 else list(reversed(trees))
            for key in order:
                say(f"round {number + 1} of {rounds}: {key}")
                found = _run_round(trees[key], cases, device)
                peers[key] = [case["peer"] for case in found]
                for total, case in zip(times[key], found):
                    total.rounds += [number * _RUNS_A_ROUND + i for i in range(len(case["times"]))]
                    total.forward += [f for f, _ in case["times"]]
                    total.backward += [b for _, b in case["times"] if b is not None]
    environment = provenance(device)
    return [
        {
            "schema": SCHEMA,
            "suite": "compare",
            "quick": False,
            "environment": environment,
            "revision": key,
            "case": case.record(),
            "checked_batch": check_case(case).batch,
            "ceilings": None,
            "peer": peers[key][place],
            "computes": case.mode,
            "status": "ok",
            "reason": None,
            "note": "",
            "peak_bytes": None,
            **figures(case, times[key][place], times[name][place], Ceilings()),
        }
        for place, case in enumerate(cases)
        for key in times
    ]


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )


def _run_round(tree: Path, cases: Sequence[Case], device: torch.device) -> list[dict[str, Any]]:
    """Times of one process that imports the operator from ``tree``, and this suite from here."""
    order = {
        "cases": [case.record() for case in cases],
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    # The operator must come from the tree even where this checkout is on the path or installed.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dream_bench_suite").symlink_to(Path(__file__).resolve().parent)
        process = subprocess.run(
            [sys.executable, "-m", "dream_bench_suite.compare", json.dumps(order)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), folder])},
            cwd=folder, capture_output=True, text=True, timeout=_ROUND_SECONDS, check=False,
        )  # fmt: skip
    if process.returncode:
        raise ValueError(f"{tree}: {process.stderr.strip()[-600:]}")
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if Path(found["operator"]).resolve().parents[1] != tree.resolve():
        raise ValueError(f"the operator came from {found['operator']}, not from {tree}")
    return found["cases"]


def _worker(order: dict[str, Any]) -> None:
    import dream_kernels

    torch.set_num_threads(order["threads"])
    device = torch.device(order["device"])
    results = []
    for record in order["cases"]:
        case = from_record(record)
        inputs = make_inputs(case, device)
        checked = make_inputs(check_case(case), device)
        name, small, whole = _first_of_ours(checked, inputs)
        complaint = Oracle(checked).complaint(ADAPTERS[name], small)
        if complaint is not None:
            sys.exit(f"{name}, {case}: {complaint}")
        times = race({name: whole}, Clock(device), _RUNS_A_ROUND, 60.0)[name]
        backward: list[float | None] = [*times.backward] or [None] * len(times.forward)
        results.append({"peer": name, "times": list(zip(times.forward, backward))})
    print(json.dumps({"operator": dream_kernels.__file__, "cases": results}))


def _first_of_ours(checked: Inputs, inputs: Inputs) -> tuple[str, Prepared, Prepared]:
    """The fastest implementation that can run, set up for the check and for the times."""
    for name, adapter in ADAPTERS.items():
        small, whole = adapter.setup(checked), adapter.setup(inputs)
        if isinstance(small, Prepared) and isinstance(whole, Prepared):
            return name, small, whole
    raise AssertionError("the reference runs everything")


def default_cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases that two commits are compared on."""
    from .cases import cpu_cases, gpu_cases, quick_cases

    if quick:
        return quick_cases()[:2]
    if device.type == "cuda":
        return [c for c in gpu_cases() if "16 documents, shared" in c.name]
    return [c for c in cpu_cases() if c.name in ("shared pool", "full sequence")]


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
