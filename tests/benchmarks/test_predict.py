"""Predicted times: what they are made of, and that the comparison with published figures holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dream_benchmarks.cases import Case, gpu_cases
from dream_benchmarks.predict import (
    BARRIER,
    CACHE_BYTES,
    CLOCK,
    PROCESSORS,
    PUBLISHED,
    RESOURCES,
    WAIT,
    Kernel,
    Resources,
    Tile,
    predict,
    published_rows,
)
from dream_kernels.triton.sass import Loop

ROOT = Path(__file__).resolve().parents[2]
LOOP = Loop("walk", 100, 40, 8, 256, 8, 10, 2, 4, 6)
KERNEL = Kernel(128, 64, 8, 200, 64 * 1024, 300, (LOOP,))


@pytest.fixture(scope="module")
def resources() -> Resources:
    return Resources(ROOT / RESOURCES)


def test_a_tile_takes_its_products_and_the_longer_of_the_rest() -> None:
    assert Tile(256, 300, 10).cycles(2, 1) == 2 * (256 + 300)
    assert Tile(256, 300, 50).cycles(2, 1) == 2 * (256 + 50 * 8)
    assert Tile(256, 300, 10, waits=8, barriers=3).cycles(1, 1) == 556 + 8 * WAIT + 3 * BARRIER
    assert Tile(1, 1, 0, bytes=240 * CACHE_BYTES).cycles(1, 2) == 480


def test_conditional_instructions_count_as_often_as_they_run() -> None:
    assert KERNEL.tile("walk", 64).issue == 100
    assert KERNEL.tile("walk", 64, rare=0.25).issue == 70
    with pytest.raises(ValueError, match="must have a loop in other, got loops in walk"):
        KERNEL.tile("other", 64)


def test_programs_run_in_waves() -> None:
    assert KERNEL.resident == 1  # by registers
    assert replace(KERNEL, registers=128).resident == 2
    assert replace(KERNEL, registers=40).resident == 3  # by shared memory
    tile = KERNEL.tile("walk", 64)
    one = KERNEL.seconds(PROCESSORS, [(10, tile)])
    assert one == pytest.approx((2 * 200 + 10 * tile.cycles(2, 1)) / CLOCK)
    assert KERNEL.seconds(PROCESSORS + 1, [(10, tile)]) == pytest.approx(2 * one)


def test_published_figures_are_met_as_well_as_is_said(resources: Resources) -> None:
    """Wider errors would make the predictions useless; see the table for the errors themselves."""
    rows = list(published_rows(resources))
    assert len(rows) == len(PUBLISHED)
    assert all(abs(predicted / published - 1) < 0.35 for *_, published, predicted in rows), rows


def test_predictions_follow_the_case_and_the_kernels(resources: Resources) -> None:
    case = next(c for c in gpu_cases() if c.prefix and c.gradients == ("query", "scores"))
    whole = predict(case, resources)
    assert predict(replace(case, gradients=("scores",)), resources).backward < whole.backward
    assert predict(replace(case, gradients=Case.gradients), resources).backward > whole.backward
    longer = replace(case, prefix=2 * case.prefix, covered=2 * case.covered)
    assert 1.7 < predict(longer, resources).forward / whole.forward < 2.1
    name = f"sm_90/{case.head_dim}/forward-reweight"
    waiting = {
        **resources.rows[name],
        "loops": [[*row[:5], row[5] + 20, *row[6:]] for row in resources.rows[name]["loops"]],
    }
    slower = Resources(resources.path)
    slower.rows = {**resources.rows, name: waiting}
    assert predict(case, slower).forward > 1.1 * whole.forward


def test_a_plan_costs_next_to_nothing_of_a_long_reading(resources: Resources) -> None:
    """Two percent of the forward, which in a reading of many layers is made once."""
    case = Case(
        "long", batch=16, query_heads=16, key_heads=4, rows=128, prefix=130_944, local=128,
        documents=1024, covered=130_048, dtype="bfloat16", gradients=("query", "scores"),
    )  # fmt: skip
    found = predict(case, resources)
    assert found.plan < 0.02 * found.forward
    longer = predict(replace(case, prefix=2 * case.prefix, documents=2048), resources)
    assert longer.plan < 2.2 * found.plan
    wider = predict(replace(case, head_dim=128), resources)  # tiles of two sizes
    assert found.plan < wider.plan < 0.02 * wider.forward


def test_a_table_that_lacks_something_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"must be a file, got {tmp_path}"):
        Resources(tmp_path)
    (tmp_path / "table.json").write_text('{"kernels": {"sm_90/64/mass": {}}}')
    with pytest.raises(ValueError, match="must have the loops of sm_90/64/mass"):
        Resources(tmp_path / "table.json").kernel(64, "mass")
