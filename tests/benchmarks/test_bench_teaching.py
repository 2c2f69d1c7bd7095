"""What teaching costs, on a tiny model: every peer runs, and both steps compute one loss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dream_benchmarks import teaching
from dream_benchmarks.records import validate
from dream_benchmarks.report import render
from dream_benchmarks.step_models import QUERY_TOKENS
from dream_benchmarks.teaching import TeachingSettings, cross_encoder_inputs, run_teaching
from helpers.tiny import quiet

SETTINGS = TeachingSettings(
    model="tiny",
    batch=4,
    pair_documents=3,
    step_documents=8,
    document_tokens=24,
    runs=1,
    quick=True,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_peer_is_timed(tmp_path) -> None:
    said: list[str] = []
    records = run_teaching(SETTINGS, said.append)
    for record in records:
        validate(record)
    rows = {record["peer"]: record for record in records}
    assert {record["status"] for record in records} == {"ok"} and len(said) == 5
    pair, step = (f"{what}: {teaching.TAUGHT}" for what in (teaching.PAIR, teaching.STEP))
    assert rows[pair]["ratio"] == rows[step]["ratio"] == 1.0
    for record in records:
        pairs = 4 * record["documents"]
        assert record["seconds_per_pair"] * pairs == pytest.approx(record["total"]["median"])
    assert {record["documents"] for record in records} == {3, 8}
    page = render(records, [], tmp_path)
    assert "Teaching, reader tiny" in page and f"| {teaching.PAIR}: RePlug |" in page


def test_pairs_have_the_lengths_of_the_reader() -> None:
    assert cross_encoder_inputs(SETTINGS).shape == (12, QUERY_TOKENS + 24 + 3)


def test_a_step_with_another_loss_gets_no_time(monkeypatch) -> None:
    """As the verdicts of another pool would give."""
    loss = teaching.TaughtDreamLoss
    monkeypatch.setattr(
        teaching, "TaughtDreamLoss", lambda model: loss(model, teacher_temperature=0.5)
    )
    rows = {record["peer"]: record for record in run_teaching(SETTINGS, quiet().print)}
    wrong = rows[f"{teaching.STEP}: {teaching.TAUGHT}"]
    assert wrong["status"] == "wrong" and wrong["total"] is None and "loss" in wrong["reason"]
    assert rows[f"{teaching.STEP}: {teaching.LIVE}"]["status"] == "ok"
