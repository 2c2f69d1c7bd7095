"""``dream evaluate`` and ``dream compare-runs``: tables, files and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.beir_folder import write_beir_folder
from dream_training.demo.docstrings import RetrievalSplit
from dream_training.evaluation import Evaluation, read_evaluations, write_evaluations
from dream_training.evaluation.options import choose_devices
from dream_training.models.retriever import build_retriever, save_retriever

CORPUS = {f"d{i}": f"document {i} of {word}" for i, word in enumerate(["apple", "river", "stone"])}
QUERIES = {"q0": "apple", "q1": "river", "q2": "stone"}
QRELS = {f"q{i}": {f"d{i}": 1} for i in range(3)}


def dream(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})


def write(path: Path, model: str, scores: list[float], task: str = "t") -> Path:
    queries = {f"q{i}": score for i, score in enumerate(scores)}
    evaluation = Evaluation(model, task, sum(scores) / len(scores), 1.0, 9, queries)
    return write_evaluations(path, [evaluation], {})


def test_several_models_on_two_folders(tiny_model, tmp_path: Path) -> None:
    split = {"test": RetrievalSplit(QUERIES, QRELS)}
    first = write_beir_folder(tmp_path / "one", CORPUS, split)
    second = write_beir_folder(tmp_path / "two", {**CORPUS, "x": "noise"}, split)
    models = [
        save_retriever(build_retriever(tiny_model, layers=n, device="cpu"), tmp_path / f"m{n}")
        for n in (1, 2)
    ]
    output = tmp_path / "evaluation.json"
    result = dream("evaluate", *models, first, "--tasks", second, "--output", output)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    evaluations = read_evaluations(output)
    assert [(Path(e.model).name, Path(e.task).name) for e in evaluations] == [
        (model, task) for model in ("m1", "m2", "BM25") for task in ("one", "two")
    ]
    for e in evaluations:
        assert any(Path(e.task).name in line and f"{e.ndcg_at_10:.4f}" in line for line in lines), e
    assert result.output.count("mean of 2") == 3
    result_of_evaluate = result.output
    assert "torch" in json.loads(output.read_text())["environment"]["versions"]

    result = dream(
        "compare-runs", output, output, "--first-model", models[0], "--second-model", "BM25"
    )
    assert result.exit_code == 0, result.output
    one, two = (e.query_ndcg_at_10 for e in (evaluations[0], evaluations[4]))
    wins, losses = (sum(a[q] > b[q] + 1e-9 for q in a) for a, b in ((two, one), (one, two)))
    assert result.output.count(f"{wins}/{3 - wins - losses}/{losses}") >= 1
    assert str(first) in result.output and str(second) in result.output
    assert f"one  {first}\n" in result_of_evaluate, "the table has names, the legend paths"
    result = dream("compare-runs", output, output)
    assert isinstance(result.exception, ValueError)
    assert "holds 2 models, name one with --first-model" in str(result.exception)


def test_the_printed_comparison(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", "runs/a/best", [0.0, 0.5, 1.0, 0.25])
    b = write(tmp_path / "b.json", "runs/b/best", [0.5, 0.5, 1.0, 1.0])
    result = dream("compare-runs", a, b)
    assert result.exit_code == 0, result.output
    assert "0.4375" in result.output and "0.7500" in result.output and "+0.3125" in result.output
    assert "2/2/0" in result.output and "runs/b/best" in result.output


@pytest.mark.parametrize(
    "scores, task, model, message",
    [
        ([0.1, 0.2, 0.3], "t", None, "task 't': the queries differ: 1 are only in the first and 0"),
        ([0.1] * 4, "other", None, "no task is in both: t in .*a.json, other in .*b.json"),
        ([0.1] * 4, "t", "nobody", "has no model 'nobody'; its models are m"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, scores, task, model, message) -> None:
    a = write(tmp_path / "a.json", "m", [0.0, 0.5, 1.0, 0.25])
    b = write(tmp_path / "b.json", "m", scores, task)
    result = dream("compare-runs", a, b, *(["--second-model", model] if model else []))
    with pytest.raises(ValueError, match=message):
        raise result.exception


def test_mistakes_of_evaluate(tiny_model, tmp_path: Path) -> None:
    folder = write_beir_folder(tmp_path / "one", CORPUS, {"test": RetrievalSplit(QUERIES, QRELS)})
    for arguments, error, message in (
        ([tmp_path / "nowhere"], ValueError, "name a task: .*nowhere"),
        ([folder], ValueError, "name at least one model"),
        (["m", "--tasks", "SciFakt"], ValueError, "mteb has no such task"),
        ([tmp_path / "nowhere", folder], (FileNotFoundError, ValueError), "nowhere"),
        (["m", folder, "--processes", "2", "--devices", "cpu"], ValueError, "not both"),
    ):
        with pytest.raises(error, match=message):
            raise dream("evaluate", *arguments).exception


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_devices(None, "") is None and choose_devices(1, "") is None
    assert choose_devices(2, "") == ["cpu", "cpu"]
    assert choose_devices(None, "cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_devices(2, "") == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="processes must be at most 2"):
        choose_devices(3, "")
