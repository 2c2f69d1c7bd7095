"""The step suite on a tiny model: all ways agree, and one that does not is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from dream_benchmarks import step
from dream_benchmarks.records import validate
from dream_benchmarks.step import StepSettings, disagreements, run_steps
from dream_benchmarks.step_models import STEP_MODELS, make_rows, make_setup
from dream_benchmarks.step_ways import (
    FullSequence,
    Stopwatch,
    WithPrefix,
    gradient_of,
    make_ways,
    run_step,
    update,
)
from dream_training import DreamLoss

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With a model this small a second thread only waits, and for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    return make_setup(STEP_MODELS["tiny"], 4, 24, CPU)


@pytest.fixture
def setup(models):
    """The models without gradients of the previous test, to which a step would add its own."""
    models.optimizer.zero_grad()
    return models


@dataclass
class _HalfScores(WithPrefix):
    """Uses half of the scores: its loss is nearly right, and its gradient is not."""

    def predict(self, setup, read, scores, watch):
        loss = super().predict(setup, read, scores, watch)
        scores.grad *= 0.5
        return loss


def test_all_ways_agree_and_a_wrong_one_is_named(setup) -> None:
    wrong = _HalfScores("wrong", "")
    assert disagreements(setup, [*make_ways(), wrong]).keys() == {"wrong"}


def test_the_check_leaves_the_models_as_they_were(setup) -> None:
    before = {n: p.dtype for n, p in setup.retriever.named_parameters()}
    disagreements(setup, [WithPrefix("shared", "")])
    assert setup.reader.model.dtype == torch.bfloat16 and len(setup.rows) == 4
    assert {n: p.dtype for n, p in setup.retriever.named_parameters()} == before


def test_the_gradient_moves_every_adapter(setup) -> None:
    run_step(setup, FullSequence(fused=True), Stopwatch(CPU))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in setup.trained)
    assert gradient_of(setup).isfinite().all()


def test_the_optimiser_works_and_changes_nothing(setup) -> None:
    run_step(setup, WithPrefix("shared", ""), Stopwatch(CPU))
    before = [p.detach().clone() for p in setup.trained]
    update(setup, Stopwatch(CPU))
    assert all(torch.equal(p, old) for p, old in zip(setup.trained, before))
    assert all(p.grad is None for p in setup.trained) and setup.optimizer.state


def test_the_shared_pool_is_what_dream_loss_computes(setup) -> None:
    way = WithPrefix("shared", "", context="joint")
    loss = run_step(setup, way, Stopwatch(CPU))
    gradient = gradient_of(setup)
    setup.optimizer.zero_grad()
    batch = setup.collator(setup.rows)
    features = [
        {k.removeprefix(f"{name}_"): v for k, v in batch.items() if k.startswith(f"{name}_")}
        for name in ("query", "document")
    ]
    own = DreamLoss(setup.retriever, setup.reader, setup.temperature)(features)
    own.backward()
    assert own.item() == pytest.approx(loss, rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(gradient_of(setup), gradient, dim=0)
    assert cosine > 0.999


def test_records_of_a_run_validate(monkeypatch) -> None:
    wrong = _HalfScores("wrong", "")
    monkeypatch.setattr(step, "make_ways", lambda: [*make_ways(), wrong])
    settings = StepSettings(
        model="tiny", batch=4, document_tokens=24, runs=1, memory=False, quick=True
    )
    said, kept = [], []
    records = run_steps(settings, said.append, kept.append)
    for record in records:
        validate(record)
    assert kept == [records]  # what is there before the memory is measured
    rows = {r["peer"]: r for r in records}
    assert rows["wrong"]["status"] == "wrong" and rows["wrong"]["total"] is None
    assert rows["naive"]["ratio"] == 1.0
    shared = rows["prefix, shared pool"]
    assert shared["tokens_per_second"] > 0 and shared["gradient_cosine"] > 0.9
    assert {"reading documents", "retriever backward", "optimiser"} <= shared["phases"].keys()
    assert "reading documents" not in rows["independent documents, cached"]["phases"]
    assert rows["independent documents"]["gradient_cosine"] is None


def test_a_batch_larger_than_the_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="batch must be at most"):
        make_rows(10_000)
