"""BEIR folders: what is written is read, by us and by beir, and errors name file and line."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from dream_training.data import beir_folder
from dream_training.data.beir_folder import read_beir_folder, write_beir_folder
from dream_training.data.forms import beir as form
from dream_training.demo.docstrings import RetrievalSplit, TrainExample
from dream_training.evaluation.tasks import is_mteb_task
from dream_training.training.inputs import load_training_data, make_evaluator

CORPUS = {"a.b": "naïve text\nwith two lines", "c": 'tab\tand "quotes"', "d": "other"}
SPLIT = RetrievalSplit(
    queries={"q1": "first … query", "q2": "second"},
    qrels={"q1": {"a.b": 1}, "q2": {"c": 1, "d": 2}},
)


def write_files(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_beir_folder(tmp_path / "set", CORPUS, {"test": SPLIT})
    assert read_beir_folder(path) == (CORPUS, SPLIT.queries, SPLIT.qrels)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = write_beir_folder(tmp_path / "set", CORPUS, {"test": SPLIT})
    for name in ("corpus.jsonl", "queries.jsonl"):
        (path / f"{name}.gz").write_bytes(gzip.compress((path / name).read_bytes()))
        (path / name).unlink()
    assert read_beir_folder(path) == (CORPUS, SPLIT.queries, SPLIT.qrels)
    assert not is_mteb_task(str(path)) and form.fits(path)
    (path / "queries.jsonl.gz").write_bytes((path / "queries.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"queries\.jsonl\.gz:\d: cannot be decompressed"):
        read_beir_folder(path)


def test_splits_share_queries_and_are_read_apart(tmp_path: Path) -> None:
    other = RetrievalSplit({"q3": "third"}, {"q3": {"d": 1}})
    path = write_beir_folder(tmp_path / "set", CORPUS, {"test": SPLIT, "repeats": other})
    assert read_beir_folder(path, "repeats")[1:] == (other.queries, other.qrels)
    assert read_beir_folder(path)[1] == SPLIT.queries


def test_beir_reads_the_folder(tmp_path: Path) -> None:
    loader = pytest.importorskip("beir.datasets.data_loader", reason="beir is not installed")
    path = write_beir_folder(tmp_path / "set", CORPUS, {"test": SPLIT})
    corpus, queries, qrels = loader.GenericDataLoader(str(path)).load(split="test")
    assert {key: row["text"] for key, row in corpus.items()} == CORPUS
    assert (queries, qrels) == (SPLIT.queries, SPLIT.qrels)


def test_train_file_has_the_relevant_document_first(tmp_path: Path) -> None:
    example = TrainExample("a.b", "a query", "its document", "its target")
    path = write_beir_folder(tmp_path / "set", CORPUS, {"test": SPLIT}, [example])
    rows = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    assert rows == [{"query": "a query", "target": "its target", "documents": ["its document"]}]


def test_own_and_empty_folders_are_replaced_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    write_beir_folder(path, CORPUS, {"test": SPLIT})
    write_beir_folder(path, {**CORPUS, "e": "new"}, {"test": SPLIT})
    assert "e" in read_beir_folder(path)[0]

    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="other content"):
        write_beir_folder(foreign, CORPUS, {"test": SPLIT})
    assert [entry.name for entry in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        write_beir_folder(foreign / "thesis.txt", CORPUS, {"test": SPLIT})


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_beir_folder(tmp_path / "set", CORPUS, {"test": SPLIT})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(beir_folder, "_write_qrels", fail)
    with pytest.raises(OSError, match="disk full"):
        write_beir_folder(path, {"x": "y"}, {"test": RetrievalSplit({}, {})})
    assert read_beir_folder(path)[0] == CORPUS
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("corpus", "split", "message"),
    [
        ({"a\tb": "x"}, RetrievalSplit({}, {}), "without tabs"),
        ({"": "x"}, RetrievalSplit({}, {}), "without tabs"),
        ({"a": "x"}, RetrievalSplit({"q": "t"}, {"q": {"b": 1}}), "unknown documents: b"),
        ({"a": "x"}, RetrievalSplit({}, {"q": {"a": 1}}), "unknown queries: q"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(
    tmp_path: Path, corpus: dict[str, str], split: RetrievalSplit, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_beir_folder(tmp_path / "set", corpus, {"test": split})
    assert not (tmp_path / "set").exists()


def test_titles_nulls_and_numeric_ids(tmp_path: Path) -> None:
    path = write_files(
        tmp_path / "set",
        '{"_id": 1, "title": null, "text": "one"}\n\n{"_id": "2", "title": "T", "text": "two"}\n',
        '{"_id": "q", "text": "query"}\n',
        "q\t1\t1\nq\t2\t0\n",
    )
    corpus, _, qrels = read_beir_folder(path)
    assert corpus == {"1": "one", "2": "T two"}
    assert qrels == {"q": {"1": 1, "2": 0}}


def test_queries_without_qrels_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_files(
        tmp_path / "set",
        '{"_id": "d", "text": "x"}\n',
        '{"_id": "q", "text": "query"}\n{"_id": "r", "text": "unjudged"}\n',
        "q\td\t1\n",
    )
    with caplog.at_level(logging.INFO):
        assert read_beir_folder(path)[1] == {"q": "query"}
    assert "1 queries have no line" in caplog.text


GOOD_CORPUS = '{"_id": "d", "text": "x"}\n'
GOOD_QUERIES = '{"_id": "q", "text": "query"}\n'


@pytest.mark.parametrize(
    ("corpus", "queries", "qrels", "message"),
    [
        (GOOD_CORPUS + "{broken\n", GOOD_QUERIES, "q\td\t1\n", r"corpus\.jsonl:2: not valid JSON"),
        (GOOD_CORPUS + "[1]\n", GOOD_QUERIES, "q\td\t1\n", r"corpus\.jsonl:2: expected a JSON obj"),
        (GOOD_CORPUS * 2, GOOD_QUERIES, "q\td\t1\n", r"corpus\.jsonl:2: 'd' appears twice"),
        ('{"text": "x"}\n', GOOD_QUERIES, "q\td\t1\n", r"corpus\.jsonl:1: '_id'"),
        (GOOD_CORPUS, '{"_id": "q", "text": null}\n', "q\td\t1\n", r"queries\.jsonl:1: 'text'"),
        (GOOD_CORPUS, GOOD_QUERIES, "q d 1\n", r"test\.tsv:2: expected query id"),
        (GOOD_CORPUS, GOOD_QUERIES, "q\td\thigh\n", r"test\.tsv:2: .*whole number"),
        (GOOD_CORPUS, GOOD_QUERIES, "q\td\t1\nq\te\t1\n", "unknown documents: e"),
        (GOOD_CORPUS, GOOD_QUERIES, "s\td\t1\n", "unknown queries: s"),
    ],
)
def test_errors_name_file_and_line(
    tmp_path: Path, corpus: str, queries: str, qrels: str, message: str
) -> None:
    path = write_files(tmp_path / "set", corpus, queries, qrels)
    with pytest.raises(ValueError, match=message):
        read_beir_folder(path)


TWO_QUERIES = GOOD_QUERIES + '{"_id": "r", "text": "other"}\n'


@pytest.mark.parametrize(
    "qrels",
    (
        "q 0 d 2\nr 0 d 0\n",  # as TREC writes them: no header
        "q\t0\td\t2\nr\tQ0\td\t0\n",
        "\nq  0   d 2\r\nr 0 d 0",
        "query-id\tcorpus-id\tscore\nq\td\t2\nr\td\t0\n",
        "\n\nqid\tdocid\trelevance\nq\td\t2\nr\td\t0\n",
    ),
)
def test_no_line_of_qrels_is_lost_regardless_of_their_form(tmp_path: Path, qrels: str) -> None:
    path = write_files(tmp_path / "set", GOOD_CORPUS, TWO_QUERIES, "")
    (path / "qrels" / "test.tsv").write_text(qrels)
    assert read_beir_folder(path)[2] == {"q": {"d": 2}, "r": {"d": 0}}


@pytest.mark.parametrize(
    "qrels, message",
    [
        ("q\td\t1\n", r"test\.tsv:1: expected the header .* or the four columns of TREC"),
        ("q\td\t1.0\n", r"test\.tsv:1: expected the header"),
        ("q d 1\n", r"test\.tsv:1: expected the header"),
        ("q 0 d 1\nr d 1\n", r"test\.tsv:2: expected query id, 0, document id and a whole number"),
        ("q 0 d 1.5\n", r"test\.tsv:1: expected query id, 0, document id and a whole number"),
        ("", r"test\.tsv: has no line with a judgement"),
        ("query-id\tcorpus-id\tscore\n\n", r"test\.tsv: has no line with a judgement"),
    ],
)
def test_malformed_and_empty_qrels_are_an_error(tmp_path: Path, qrels: str, message: str) -> None:
    path = write_files(tmp_path / "set", GOOD_CORPUS, TWO_QUERIES, "")
    (path / "qrels" / "test.tsv").write_text(qrels)
    with pytest.raises(ValueError, match=message):
        read_beir_folder(path)


def test_a_missing_split_or_file_is_named_with_those_present(tmp_path: Path, run) -> None:
    path = write_files(tmp_path / "set", GOOD_CORPUS, GOOD_QUERIES, "q\td\t0\n")
    with pytest.raises(ValueError, match=r"set: qrels/test\.tsv calls no document relevant"):
        make_evaluator(run(eval_data=str(path)).evaluation, 0)
    (path / "qrels" / "test.tsv").rename(path / "qrels" / "dev.tsv")
    message = r"qrels/test\.tsv: there is no such split, only dev: choose .* eval_split"
    with pytest.raises(FileNotFoundError, match=message):
        make_evaluator(run(eval_data=str(path)).evaluation, 0)
    with pytest.raises(FileNotFoundError, match=r"qrels/train\.tsv: there is no .* train_split"):
        load_training_data(run(train_data=str(path)).data, 0)
    assert read_beir_folder(path, "dev")[2] == {"q": {"d": 0}}
    (path / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"^[^\[]*queries\.jsonl: there is no such file"):
        read_beir_folder(path, "dev")
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {tmp_path}/nowhere$"):
        read_beir_folder(tmp_path / "nowhere")
