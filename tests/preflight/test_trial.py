"""The doctor's trial says beforehand whether training on taught lines makes a retriever worse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dream_training.evaluation import RetrievalTask
from dream_training.evaluation.paired import compare_queries
from dream_training.preflight.check import FAULT, OK, WARNING
from dream_training.preflight.diagnosis import diagnose
from dream_training.preflight.trial import of_trial, small_part
from dream_training.teaching.teach import teach
from helpers.taught import teaching_config
from helpers.tiny import quiet, write_tiny_data


def test_a_run_on_taught_lines_is_tried(tiny_model: Path, tmp_path: Path) -> None:
    _, beir = write_tiny_data(tmp_path, 24)
    config = teaching_config(tiny_model, tmp_path, eval_data=str(beir))
    folder = tmp_path / "taught"
    teach(config, folder, console=quiet())
    taught = config.with_changes(taught=str(folder), train_data=str(folder), learning_rate=0.1)
    checks = {check.name: check for check in diagnose(taught)}
    figure = checks["trial"].figure
    assert "after 5 steps" in figure and "p = " in figure
    before, after = map(float, re.findall(r"(0\.\d+) (?:before|after)", figure))
    assert 0 < before < 1 and before != after
    assert not (tmp_path / "out").exists()
    assert "trial" not in {check.name for check in diagnose(taught.with_changes(eval_data=None))}


@pytest.mark.parametrize(
    "gains, status",
    [([0.1] * 30, OK), ([0.0] * 30, OK), ([-0.1] * 30, FAULT), ([0.1, -0.11] * 15, WARNING)],
    ids=("better", "the same", "worse", "worse by chance"),
)
def test_a_trial_is_judged(gains: list[float], status: str) -> None:
    before = {str(i): 0.5 for i in range(30)}
    after = {str(i): 0.5 + gain for i, gain in enumerate(gains)}
    check = of_trial(compare_queries(before, after), 50, 1000)
    assert check.status == status and bool(check.advice) == (status != OK)
    assert "nDCG@10 0.500 before and" in check.figure and "1,000 documents" in check.figure


def test_the_small_part_has_what_is_relevant() -> None:
    task = RetrievalTask(
        {f"q{i}": "" for i in range(300)},
        {f"d{i}": "" for i in range(3000)},
        {f"q{i}": {f"d{2 * i}": 1, "d2999": 0} for i in range(300)},
    )
    part = small_part(task, 0)
    assert len(part.queries) == 200 and len(part.corpus) == 1000
    assert all(f"d{2 * int(query[1:])}" in part.corpus for query in part.queries)
    assert part == small_part(task, 0) and part.corpus != small_part(task, 1).corpus
