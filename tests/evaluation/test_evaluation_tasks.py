"""Tasks by name: folders, BEIR's sets, mteb's tasks, presets."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import requests
from beir import util
from datasets import Dataset
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.beir_folder import write_beir_folder
from dream_training.demo.docstrings import RetrievalSplit
from dream_training.evaluation import PRESETS, Evaluation, evaluate_task, expand_tasks
from dream_training.evaluation.beir_sets import fetch
from dream_training.evaluation.mteb_tasks import evaluate_mteb_task, get_task
from dream_training.evaluation.options import EvaluationOptions
from dream_training.evaluation.results import read_evaluations, write_evaluations
from dream_training.evaluation.tasks import check_tasks, evaluate_bm25
from dream_training.models.retriever import build_retriever
from dream_training.training.inputs import make_evaluator

CORPUS = {"a": "red apples", "b": "blue rivers", "c": "green stones", "q1": "grey clouds"}
QUERIES = {"q1": "apples", "q2": "rivers or stones", "q3": "clouds"}
QRELS = {"q1": {"a": 1}, "q2": {"b": 2, "c": 1}, "q3": {"q1": 1}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir_folder(tmp_path / "mine", CORPUS, {"test": RetrievalSplit(QUERIES, QRELS)})


@pytest.fixture(scope="module")
def model(tiny_model):
    return build_retriever(tiny_model, layers=1, device="cpu", max_len=64)


def test_presets_are_expanded_once() -> None:
    names = expand_tasks(["beir9", "SciFact", "beir9", " rteb14 "])
    assert names == [*PRESETS["beir9"], *PRESETS["rteb14"]]
    assert len(PRESETS["beir9"]) == 9 and len(PRESETS["rteb14"]) == 14
    with pytest.raises(ValueError, match="a task must be a name, got ''"):
        expand_tasks([""])


def test_mteb_has_every_task_of_the_presets() -> None:
    import mteb

    check_tasks(["beir9", "rteb14"])
    beir = {task.metadata.name for task in mteb.get_benchmark("BEIR").tasks}
    assert set(PRESETS["beir9"]) <= beir
    rteb = [task for task in mteb.get_benchmark("RTEB(eng, beta)").tasks if task.metadata.is_public]
    open_tasks = {task.metadata.name for task in rteb}
    assert set(PRESETS["rteb14"]) == open_tasks - {"SWEbenchCodeRetrieval"}
    (cure,) = (task for task in rteb if task.metadata.name == "CUREv1")
    assert get_task("CUREv1").hf_subsets == cure.hf_subsets


@pytest.mark.parametrize(
    "task, error, message",
    [
        ("SciFakt", ValueError, "task 'SciFakt': mteb has no such task: .*SciFact"),
        ("STS12", ValueError, "task 'STS12' must be a retrieval task, got STS"),
        ("CQADupstackRetrieval", ValueError, "is a collection; name its parts: CQADupstackAndroid"),
        ("beir:scifakt", ValueError, "beir:scifakt: BEIR has no such set; did you mean 'scifact'"),
        ("./nowhere", FileNotFoundError, "'./nowhere': there is no BEIR folder with a corpus"),
    ],
)
def test_wrong_names_are_found_without_fetching(task: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_tasks([task])


def test_a_folder_and_its_file(model, folder: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(query_max_len=8, passage_max_len=16)
    dense = evaluate_task(model, "tiny", str(folder), options)
    assert dense.query_ndcg_at_10.keys() == QUERIES.keys() and dense.documents == 4
    mean = sum(dense.query_ndcg_at_10.values()) / 3
    assert dense.ndcg_at_10 == pytest.approx(mean)
    assert dense.settings["query_max_len"] == 8 and dense.settings["split"] == "test"
    bm25 = evaluate_bm25(str(folder), options)
    assert bm25.query_ndcg_at_10["q1"] == 1.0 and bm25.recall_at_10 == 1.0
    path = write_evaluations(tmp_path / "new" / "evaluation.json", [dense, bm25], {"x": 1})
    assert read_evaluations(path) == read_evaluations(path.parent) == [dense, bm25]
    assert [p.name for p in path.parent.iterdir()] == ["evaluation.json"]


def test_one_set_has_one_figure_whichever_command_evaluates(
    model, tmp_path: Path, monkeypatch, caplog, run
) -> None:
    """A query that is a document of the same id: a folder, a set of BEIR, mteb, BM25, training."""
    queries, corpus = {"q": "red apples"}, {"q": "red apples", "d": "red apples again"}
    split = RetrievalSplit(queries, {"q": {"d": 1}})
    folder = str(write_beir_folder(tmp_path / "duplicates", corpus, {"test": split}))
    monkeypatch.setattr("dream_training.evaluation.beir_sets.fetch", lambda *_: Path(folder))
    options = EvaluationOptions()
    found = [evaluate_task(model, "tiny", name, options) for name in (folder, "beir:quora")]
    found.append(evaluate_bm25(folder, options))
    task = mteb_task(corpus, split)
    task.ignore_identical_ids = True
    found.append(evaluate_mteb_task(model, "tiny", task, options))
    assert [e.ndcg_at_10 for e in found] == [1.0] * 4
    assert [e.settings["identical_ids_dropped"] for e in found] == [1] * 4
    assert make_evaluator(run(eval_data=folder).evaluation, 0)(model)["ndcg_at_10"] == 1.0
    assert not caplog.records, "a query that is a document is what the rule is for"
    # On request they are kept.
    options = EvaluationOptions(keep_identical_ids=True)
    task = mteb_task(corpus, split)
    task.ignore_identical_ids = True
    found = [evaluate_task(model, "tiny", folder, options), evaluate_bm25(folder, options)]
    found.append(evaluate_mteb_task(model, "tiny", task, options))
    assert [e.ndcg_at_10 for e in found] == [pytest.approx(0.631, abs=1e-3)] * 3
    assert [e.settings["identical_ids_dropped"] for e in found] == [0] * 3
    evaluator = make_evaluator(run(eval_data=folder, keep_identical_ids=True).evaluation, 0)
    assert evaluator(model)["ndcg_at_10"] == pytest.approx(0.631, abs=1e-3)


def test_ids_that_are_equal_by_chance_are_reported_once(model, folder: Path, caplog) -> None:
    options = EvaluationOptions()
    for _ in range(2):
        assert evaluate_bm25(str(folder), options).settings["identical_ids_dropped"] == 1
    (record,) = caplog.records
    assert "mine: 1 of 3 queries share their id with a document of another text" in record.message
    assert "--keep-identical-ids" in record.message
    # A relevant document is ranked regardless of its id.
    numbered = {"1": "one", "2": "two"}
    split = RetrievalSplit({"1": "what is one", "2": "what is two"}, {q: {q: 1} for q in numbered})
    write_beir_folder(folder, numbered, {"test": split})
    assert evaluate_bm25(str(folder), options).ndcg_at_10 == 1.0
    result = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"})
    assert "--keep-identical-ids" in result.stdout


def test_files_that_are_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    row = {"model": "m", "task": "t", "ndcg_at_10": 1.0, "recall_at_10": 1.0, "documents": 2}
    for content, message in (
        ("[", "not valid JSON"),
        ("[]", "must hold an object, got list"),
        ("{}", "must hold a list named 'evaluations'"),
        (json.dumps({"evaluations": [row]}), r"evaluations\[0\]: missing .*query_ndcg_at_10"),
        (json.dumps({"evaluations": [{**row, "query_ndcg_at_10": {}}]}), "at least one query"),
        (json.dumps({"evaluations": [{**row, "query_ndcg_at_10": {"q": "x"}}]}), "query 'q'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_evaluations(path)
        assert str(caught.value).startswith(str(path))
    with pytest.raises(FileNotFoundError):
        read_evaluations(tmp_path / "nowhere.json")


def archive(folder: Path, name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, f"{name}/{path.relative_to(folder)}")
    return content.getvalue()


class Response:
    """What ``requests.get`` gives for a file of these bytes."""

    def __init__(self, content: bytes) -> None:
        self.content, self.headers = content, {"Content-Length": str(len(content))}

    def iter_content(self, chunk_size: int):
        yield from (self.content[i : i + 100] for i in range(0, len(self.content), 100))


def test_a_set_of_beir_is_fetched_once(model, folder: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def get(url: str, **options):
        asked.append(url)
        return Response(archive(folder, "scifact"))

    monkeypatch.setattr(util.requests, "get", get)
    options = EvaluationOptions(cache_dir=tmp_path / "cache")
    fetched = evaluate_task(model, "tiny", "beir:scifact", options)
    again = evaluate_task(model, "tiny", "beir:scifact", options)
    assert len(asked) == 1 and asked[0].endswith("/scifact.zip")
    assert fetched == again
    local = evaluate_task(model, "tiny", str(folder), options)
    assert fetched.query_ndcg_at_10 == local.query_ndcg_at_10
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["scifact"]


def test_what_cannot_be_fetched_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    """An error page, an archive of something else, and no network."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "readme").write_text("moved")
    contents = [b"<html>503</html>", archive(other, "nfcorpus"), None]

    def get(url: str, **options):
        content = contents.pop(0)
        if content is None:
            raise requests.exceptions.ConnectionError("no route to host")
        return Response(content)

    monkeypatch.setattr(util.requests, "get", get)
    cache = tmp_path / "cache"
    for reason in ("not a zip file", "holds no corpus.jsonl", "no route to host"):
        with pytest.raises(FileNotFoundError, match=rf"'beir:nfcorpus': https://.*{reason}"):
            fetch("nfcorpus", cache)
        assert not list(cache.iterdir())


def mteb_task(corpus: dict[str, str], split: RetrievalSplit):
    """A task of mteb with data in memory in place of what it would fetch."""
    task = get_task("NFCorpus")
    task.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_list(
                    [{"id": d, "text": text, "title": ""} for d, text in corpus.items()]
                ),
                "queries": Dataset.from_list(
                    [{"id": q, "text": text} for q, text in split.queries.items()]
                ),
                "relevant_docs": split.qrels,
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True
    return task


def test_mteb_evaluates_and_every_query_is_kept(model, monkeypatch) -> None:
    """Identical ids are dropped if the task says so."""
    for ignore in (False, True):
        task = mteb_task(CORPUS, RetrievalSplit(QUERIES, QRELS))
        task.ignore_identical_ids = ignore
        result = evaluate_mteb_task(model, "tiny", task, EvaluationOptions(passage_max_len=16))
        assert isinstance(result, Evaluation)
        assert result.task == "NFCorpus" and result.documents == 4
        assert result.query_ndcg_at_10.keys() == QUERIES.keys()
        mean = sum(result.query_ndcg_at_10.values()) / 3
        assert result.ndcg_at_10 == pytest.approx(mean, abs=1e-5)
        assert result.settings["passage_max_len"] == 16 and result.settings["query_max_len"] == 64
        assert model.max_seq_length == 64 and "encode_query" not in vars(model)
        assert not task.data_loaded


def test_without_a_network_the_task_is_named(model) -> None:
    with pytest.raises(FileNotFoundError, match="task 'NFCorpus': its data set 'mteb/nfcorpus'"):
        evaluate_task(model, "tiny", "NFCorpus", EvaluationOptions())
