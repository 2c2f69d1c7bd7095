"""What a run records for the report: examples, geometry, every query's score, final tasks."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer

from dream_training.config import TrainConfig
from dream_training.evaluation import read_evaluations
from dream_training.models.retriever import build_retriever
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from dream_training.training.examples import TrainingExamples, geometry
from helpers.tiny import make_rows, write_tiny_data


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """Train on tiny data; returns the console's text."""
    data, beir = write_tiny_data(tmp_path, 12)

    def make(**changes) -> str:
        values = {
            "reader": str(tiny_model),
            "retriever": str(tiny_model),
            "retriever_layers": 1,
            "lora_r": 2,
            "train_data": str(data),
            "eval_data": str(beir),
            "eval_queries": 3,
            "top_k": 3,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": 2,
            "eval_steps": 1,
            "device": "cpu",
            "report_queries": 3,
            "output_dir": str(tmp_path / "out"),
        }
        console = Console(file=io.StringIO(), width=200)
        train(TrainConfig(**{**values, **changes}), console=console, overwrite=True)
        return console.file.getvalue()

    return make


def test_a_run_keeps_examples_and_every_query(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run(final_tasks=[str(tmp_path / "beir")])
    assert f"{tmp_path / 'beir'}: nDCG@10 " in printed

    examples = json.loads((out / "examples.json").read_text())
    assert len(examples["queries"]) == len(examples["documents"]) == 3
    for row in examples["queries"]:
        assert examples["documents"][row["positive"]].split()[1] in row["query"]
        for moment in ("before", "after"):
            assert sum(row[moment]["weights"]) == pytest.approx(1, abs=1e-4)
            assert row[moment]["loss"] > 0
        assert 0 < sum(row["mass"]) < 1
    weights = [[q[m]["weights"] for q in examples["queries"]] for m in ("before", "after")]
    assert weights[0] != weights[1]
    assert examples["geometry"]["pairs"] == 12
    assert examples["geometry"]["before"] != examples["geometry"]["after"]

    untrained, trained = read_evaluations(out)
    assert untrained.model == "untrained" and len(untrained.query_ndcg_at_10) == 3
    # In full after training: all queries, with the model that was kept.
    assert Path(trained.model).parent == out and len(trained.query_ndcg_at_10) == 6
    history = json.loads((out / "history.json").read_text())
    assert untrained.ndcg_at_10 == pytest.approx(history["evaluations"][0]["ndcg_at_10"])
    assert "torch" in json.loads((out / "environment.json").read_text())["versions"]


def test_the_kept_scores_are_those_of_the_kept_model(run, tmp_path: Path) -> None:
    run(eval_queries=None)
    untrained, trained = read_evaluations(tmp_path / "out")
    history = json.loads((tmp_path / "out" / "history.json").read_text())["evaluations"]
    values = [e["ndcg_at_10"] for e in history]
    step = trained.settings["step"]
    assert trained.ndcg_at_10 == pytest.approx(values[step])
    assert Path(trained.model).name == "best"
    assert step == values.index(max(values))
    assert untrained.query_ndcg_at_10.keys() == trained.query_ndcg_at_10.keys()
    SentenceTransformer(trained.model, device="cpu")


def test_a_later_run_leaves_nothing_of_an_earlier_one(run, tmp_path: Path) -> None:
    run()
    out = tmp_path / "out"
    assert (out / "examples.json").exists() and (out / "evaluation.json").exists()
    run(report_queries=0, eval_data=None, max_steps=1)
    assert not (out / "examples.json").exists() and not (out / "evaluation.json").exists()


def test_an_objective_without_a_reader_has_weights_alone(run, tmp_path: Path) -> None:
    run(objective="infonce", eval_data=None, max_steps=1)
    (row, *_) = json.loads((tmp_path / "out" / "examples.json").read_text())["queries"]
    assert row["mass"] is None and row["after"]["loss"] is None
    assert len(row["after"]["weights"]) == 3


def test_wrong_final_tasks_are_found_before_training(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mteb has no such task"):
        run(final_tasks=["SciFakt"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="final_tasks must be list or null, got 'beir9'"):
        run(final_tasks="beir9")


def test_measuring_leaves_the_training_as_it_was(run, tmp_path: Path) -> None:
    losses = []
    for queries in (0, 3):
        run(report_queries=queries, eval_data=None)
        steps = json.loads((tmp_path / "out" / "history.json").read_text())["steps"]
        losses.append([step["loss"] for step in steps])
    assert losses[0] == losses[1]


def test_the_mass_is_the_attention_of_the_injected_heads(tiny_model: Path) -> None:
    rows = make_rows(3)
    reader = Reader.from_pretrained(tiny_model, {1: [2], 2: [0, 3]}, device="cpu")
    model = build_retriever(tiny_model, layers=1, device="cpu", max_len=32)
    examples = TrainingExamples(rows, 2, seed=0)
    examples.measure("before", model, reader, 0.1)
    prefix = reader.read(examples.documents)
    queries = [row["query"] for row in examples.rows]
    ids, mask, weights = reader.query_rows(queries)
    every = reader.injection.read_mass(
        weights, input_ids=ids, attention_mask=mask, document_prefix=prefix
    )
    expected = (every[1, :, 2] + every[2, :, 0] + every[2, :, 3]) / 3
    torch.testing.assert_close(examples.mass, expected)


def test_known_documents_come_first_and_pools_stay_small() -> None:
    row = {"query": "q", "target": "t", "documents": ["a", "b", "c", "d"], "positive": 2}
    unknown = {"query": "p", "target": "t", "documents": ["a", "e"], "positive": None}
    examples = TrainingExamples(iter([row, unknown]), 2, seed=0)
    assert examples.documents == ["c", "a", "e"]
    assert examples.positives == [0, -1]
    assert examples.pairs == [("q", "c")]


def test_alignment_and_uniformity_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = geometry(x, x.roll(1, 0))
    assert found["alignment"] == pytest.approx((4 + 2 + 2) / 3)
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert found["uniformity_queries"] == pytest.approx(expected, rel=1e-5)
    assert found["uniformity_documents"] == pytest.approx(expected, rel=1e-5)
