"""Every fuzz target on its seeds and some mutations of them; ``make fuzz`` runs longer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fuzz.driver import try_mutations
from helpers.own_process import in_own_process, run_command
from helpers.soak_record import SOAK, record

FOLDER = Path(__file__).resolve().parents[1] / "fuzz"
HELPERS = {"driver", "scratch"}
TARGETS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in HELPERS)
COUNT = 20_000 if SOAK else 400


def mutations(name: str) -> int:
    target = importlib.import_module(f"fuzz.{name}")
    return try_mutations(target.check, target.SEEDS, count=max(COUNT, len(target.SEEDS)))


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_finds_nothing(name: str) -> None:
    """In its own process: a finding may crash it or exhaust its memory."""
    record(f"mutations {name}", inputs=in_own_process(mutations, name))


def seeds_read(name: str) -> tuple[int, int] | None:
    """How many reads succeeded, and of how many seeds; None if a target catches no errors."""
    target = importlib.import_module(f"fuzz.{name}")
    if not hasattr(target, "refused"):
        return None
    outcomes, original = [], target.refused
    target.refused = lambda *args: outcomes.append(original(*args)) or outcomes[-1]
    for seed in target.SEEDS:
        target.check(seed)
    return outcomes.count(False), len(target.SEEDS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_third_of_the_seeds_is_read_by_their_target(name: str) -> None:
    """A target all of whose inputs are refused would test nothing."""
    found = in_own_process(seeds_read, name)
    if found is None:
        pytest.skip("it has no errors to catch")
    read, seeds = found
    assert read >= seeds / 3


def test_a_finding_is_reported_with_its_input() -> None:
    def check(data: bytes) -> None:
        if b"needle" in data:
            raise KeyError("found")

    with pytest.raises(AssertionError, match=r"KeyError\('found'\)\ninput: b'a needle'"):
        try_mutations(check, [b"hay", b"a needle"], count=10)


def test_a_target_runs_by_itself() -> None:
    process = run_command(
        *(sys.executable, "-m", "fuzz.native"),
        env={
            **{"FUZZ_SECONDS": "0.5", "PATH": "", "OMP_NUM_THREADS": "1"},
            "PYTHONPATH": str(FOLDER.parent),
        },
    )
    assert process.returncode == 0, process.stderr
    assert "no finding" in process.stdout
