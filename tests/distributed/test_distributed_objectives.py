"""Losses and gradients of several processes equal those of one with the same global batch."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import distributed_cases
from helpers.processes import Processes
from helpers.soak_record import record

ROWS = distributed_cases.make_rows(6, shared=4)
# Unequal in queries, in documents and in target tokens.
BATCHES = [ROWS[:2], ROWS[2:]]
# The second process brings no text that the first does not bring too.
REPEATED = [ROWS[:4], [{**row, "query": f"and {row['query']}"} for row in ROWS[1:3]]]
OBJECTIVES = ("dream", "distilled", "replug", "emdr", "revela", "infonce")


def check(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Loss and gradient within 1e-9, and the same in all processes."""
    size = expected["gradient"].norm()
    assert size > 0
    for result in found:
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        assert (result["gradient"] - expected["gradient"]).norm() < 1e-9 * size
        assert result["metrics"] == found[0]["metrics"]
        assert result["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_a_gathered_pool_is_that_of_one_process(two, folder, engine: str, objective: str) -> None:
    options = {"objective": objective, "pool": "in_batch"}
    expected = distributed_cases.alone(folder, [ROWS], **options)
    found = two.run("step", folder, BATCHES, engine=engine, gather_across_devices=True, **options)
    check(found, expected)
    for name, value in expected["metrics"].items():
        if name != "tokens":  # padding differs, and headers are read twice
            assert found[0]["metrics"][name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize(
    "engine,objective",
    [
        ("ddp", "dream"),
        ("ddp", "distilled"),
        ("ddp", "emdr"),
        ("ddp", "revela"),
        ("fsdp2", "dream"),
        ("fsdp2", "infonce"),
    ],
)
def test_pools_of_their_own_are_weighted_by_what_they_predict(
    two, folder, engine: str, objective: str
) -> None:
    expected = distributed_cases.alone(folder, BATCHES, objective)
    check(two.run("step", folder, BATCHES, objective, engine=engine), expected)


@pytest.mark.parametrize("objective", ("dream", "replug", "revela"))
def test_a_process_may_have_nothing_of_its_own(two, folder, objective: str) -> None:
    expected = distributed_cases.alone(folder, [REPEATED[0] + REPEATED[1]], objective)
    options = {"engine": "ddp", "gather_across_devices": True}
    check(two.run("step", folder, REPEATED, objective, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"context": "joint", "gather_across_devices": True},
        {"pool": "mined"},
        {"lora_r": 0, "gather_across_devices": True},
    ],
    ids=["joint", "mined", "all weights"],
)
@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_other_ways_to_read_and_train(two, folder, engine: str, options: dict) -> None:
    batches = [ROWS] if options.get("gather_across_devices") else BATCHES
    plain = {k: v for k, v in options.items() if k != "gather_across_devices"}
    check(
        two.run("step", folder, BATCHES, engine=engine, **options),
        distributed_cases.alone(folder, batches, **plain),
    )


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
@pytest.mark.parametrize("gather", (True, False), ids=["gathered", "own"])
def test_mini_batches_change_nothing(two, folder, engine: str, gather: bool) -> None:
    """The processes have unequal numbers of them."""
    expected = distributed_cases.alone(folder, [ROWS] if gather else BATCHES)
    options = {"engine": engine, "gather_across_devices": gather, "mini_batch_size": 2}
    check(two.run("step", folder, BATCHES, **options), expected)


@pytest.mark.parametrize("objective", ("dream", "distilled", "revela"))
def test_accumulated_batches_are_weighted_over_processes_too(two, folder, objective: str) -> None:
    batches = [[ROWS[:1], ROWS[1:3]], [ROWS[3:5], ROWS[5:]]]
    expected = distributed_cases.alone(folder, batches[0] + batches[1], objective)
    size = expected["gradient"].norm()
    for result in two.run("accumulated", folder, batches, objective):
        assert (result["gradient"] - expected["gradient"]).norm() < 1e-9 * size
        assert result["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-9)


def test_an_engine_that_holds_the_gradients_cannot_weight_them(two, folder) -> None:
    batches = [[ROWS[:1], ROWS[1:3]], [ROWS[3:5], ROWS[5:]]]
    for result in two.run("accumulated", folder, batches, engine="fsdp2"):
        assert "gradient_accumulation_steps must be 1 with FSDP" in result["refused"]


@pytest.mark.parametrize("objective,gather", [("dream", True), ("dream", False), ("emdr", False)])
def test_a_sharded_reader_reads_the_same(two, folder, objective: str, gather: bool) -> None:
    """Passes of one query: the second process has twice as many as the first."""
    batches = [ROWS[:1], ROWS[1:3]]
    expected = distributed_cases.alone(folder, [ROWS[:3]] if gather else batches, objective)
    options = {"sharded": True, "rows_per_pass": 1, "gather_across_devices": gather}
    check(two.run("step", folder, batches, objective, engine="ddp", **options), expected)


def test_a_learned_temperature_gets_the_gradient_of_all(two, folder) -> None:
    temperature = distributed_cases.Temperature(0.1, learnable=True).double()
    expected = distributed_cases.alone(folder, BATCHES, temperature=temperature)
    found = two.run("step", folder, BATCHES, engine="ddp", learnable=True)
    check(found, expected)
    for result in found:
        assert result["temperature"].item() == pytest.approx(
            expected["temperature"].item(), rel=1e-9
        )


@pytest.mark.soak
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_four_processes_are_one_too(
    tmp_path_factory: pytest.TempPathFactory, folder, engine: str, objective: str
) -> None:
    batches = [ROWS[:1], ROWS[1:3], ROWS[3:4], ROWS[4:]]
    four = Processes(4, tmp_path_factory.mktemp("four"))
    try:
        for gather in (True, False):
            expected = distributed_cases.alone(folder, [ROWS] if gather else batches, objective)
            options = {"engine": engine, "gather_across_devices": gather}
            found = four.run("step", folder, batches, objective, **options)
            check(found, expected)
            record(
                "four processes against one",
                objective=objective,
                engine=engine,
                gathered=gather,
                relative_error_of_gradient=float(
                    (found[0]["gradient"] - expected["gradient"]).norm()
                    / expected["gradient"].norm()
                ),
            )
    finally:
        four.close()


def test_pools_of_each_query_are_not_gathered(two, folder) -> None:
    for said in two.run("refusal", folder, BATCHES, pool="mined", gather_across_devices=True):
        assert "gather_across_devices must be false" in said
