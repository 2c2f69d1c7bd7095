"""Forms of data that users already have: each becomes the same rows or a clear error."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from dream_training.data.beir_folder import write_beir_folder
from dream_training.data.jsonl import iterate_training_rows, read_training_data
from dream_training.data.targets import sentence_nearest
from dream_training.demo.docstrings import RetrievalSplit

TEVATRON = {
    "query_id": "3",
    "query": "who wrote Emma",
    "answers": ["Jane Austen", "Austen"],
    "positive_passages": [{"docid": "1", "title": "Emma", "text": "A novel by Jane Austen."}],
    "negative_passages": [{"docid": "2", "title": "", "text": "Emma is a name."}],
}
FLAG = {"query": "who wrote Emma", "pos": ["By Austen."], "neg": ["A name."], "pos_scores": [1.0]}
TRIPLET = {"anchor": "who wrote Emma", "positive": "By Austen.", "negative": "A name."}


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row, target_from, expected",
    [
        (
            TEVATRON,
            None,
            ("Jane Austen", ["Emma\nA novel by Jane Austen.", "Emma is a name."]),
        ),
        ({**TEVATRON, "target": "own"}, "answers", ("Jane Austen", None)),
        (FLAG, "positive", ("By Austen.", ["By Austen.", "A name."])),
        ({**FLAG, "neg": []}, "positive", ("By Austen.", ["By Austen."])),
        ({**FLAG, "neg": None}, "positive", ("By Austen.", ["By Austen."])),
        (TRIPLET, "positive", ("By Austen.", ["By Austen.", "A name."])),
        (
            {"question": "who wrote Emma", "document": "By Austen.", "target": "Austen"},
            None,
            ("Austen", ["By Austen."]),
        ),
        (
            {**TRIPLET, "negative_1": "B name.", "negative_2": None},
            "positive_sentence",
            ("By Austen.", ["By Austen.", "A name.", "B name."]),
        ),
    ],
)
def test_a_form_becomes_columns(tmp_path: Path, row, target_from, expected) -> None:
    path = write_lines(tmp_path / "data.jsonl", row)
    (read,) = read_training_data(path, target_from=target_from)
    target, documents = expected
    assert (read["query"], read["target"], read["positive"]) == ("who wrote Emma", target, 0)
    assert documents is None or read["documents"] == documents


def test_the_positive_is_not_among_the_negatives(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        {"query": "q", "pos": ["One  text", "Two"], "neg": ["other", "one text", "TWO", "other"]},
    )
    (row,) = iterate_training_rows(path, need_target=False)
    assert row.documents == ("One  text", "Two", "other") and row.positives == (0, 1)


def test_without_a_target_the_error_names_the_option(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", FLAG)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: has no target; say with target_from"):
        read_training_data(path)
    with pytest.raises(ValueError, match=r":1: has no answers, which target_from asks for"):
        read_training_data(path, target_from="answers")
    with pytest.raises(ValueError, match=r"target_from must be answers.* got 'positve'"):
        read_training_data(path, target_from="positve")
    unknown = write_lines(tmp_path / "u.jsonl", {"query": "q", "documents": ["d"]})
    with pytest.raises(ValueError, match=r":1: has no known positive, whose text target_from='pos"):
        read_training_data(unknown, target_from="positive")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "q", "pos": "text"}, "pos must be a list of at least one candidate, got 'text'"),
        ({"query": "q", "pos": ["a"], "neg": ["b", ""]}, r"neg\[1\] must be a text"),
        ({**TEVATRON, "positive_passages": []}, "positive_passages must be a list of at least"),
        ({**TEVATRON, "negative_passages": {}}, "negative_passages must be a list, got {}"),
        ({**TEVATRON, "query": 5}, "query must be a text that is not empty, got 5"),
        ({**TRIPLET, "positive": 3}, "positive must be a text"),
        ({"question": "q", "context": "c"}, "its keys are question, context, which is no known"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: dict, message: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", row)
    with pytest.raises(ValueError, match=message) as error:
        read_training_data(path, target_from="positive")
    assert str(error.value).startswith(f"{path}:1: ")


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    rows = [TEVATRON, {**TEVATRON, "query_id": "4", "query": "again"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "a.jsonl").write_text("\n" + lines)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(lines)
    for name, text in (("d.jsonl.gz", lines), ("e.json.gz", json.dumps(rows))):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(text)
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "f.parquet")
    data.save_to_disk(tmp_path / "g")
    DatasetDict({"dev": data}).save_to_disk(tmp_path / "h")
    folder = tmp_path / "i"
    folder.mkdir()
    data.to_parquet(folder / "train.parquet")
    expected = list(read_training_data(tmp_path / "a.jsonl"))
    assert [row["query"] for row in expected] == ["who wrote Emma", "again"]
    for name in ("b.json", "c.json", "d.jsonl.gz", "e.json.gz", "f.parquet", "g", "i"):
        assert list(read_training_data(tmp_path / name)) == expected, name
    assert list(read_training_data(tmp_path / "h", split="dev")) == expected
    with pytest.raises(ValueError, match="has no split 'train'; it has dev"):
        read_training_data(tmp_path / "h")


@pytest.mark.parametrize("name", ("t.csv", "t.tsv", "t.csv.gz"))
def test_tables_are_read(tmp_path: Path, name: str) -> None:
    """With quoted cells of several lines, of any length, and empty ones."""
    rows = [
        {"query": "who, and why?", "document": "one\ntwo, three", "target": "x" * 200_000},
        {"query": 'a "name"', "document": "D", "target": "t", "negative": "N"},
    ]
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8-sig", newline="") as file:
        columns = ["query", "document", "target", "negative"]
        writer = csv.DictWriter(file, columns, delimiter="\t" if "tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)
    limit = csv.field_size_limit()
    first, second = read_training_data(tmp_path / name)
    assert (first["query"], first["target"]) == ("who, and why?", "x" * 200_000)
    assert first["documents"] == ["one\ntwo, three"] and second["documents"] == ["D", "N"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("none.jsonl", None, FileNotFoundError, "there is no such file"),
        ("a/b/none", None, FileNotFoundError, "there is no such file"),
        ("x.xlsx", b"a,b", ValueError, r"expected a file that ends in \.jsonl, \.json, \.csv"),
        ("x.csv", b"query,document\nq\n", ValueError, r"x\.csv:2: expected 2 cells, as the first"),
        ("x.csv", b"query,document\nq,d,e\n", ValueError, r"x\.csv:2: expected 2 cells"),
        ("x.csv", b'query,document\nq,"d\n', ValueError, r"x\.csv:\d: cannot be read as a table"),
        ("x.csv", b"query,document\n\xff,d\n", ValueError, r"x\.csv:\d: cannot be read as a table"),
        ("x.csv.gz", b"plain", ValueError, "cannot be read as a table"),
        ("x.csv", b"query,document\n,d\n", ValueError, "x.csv:2: query must be a text"),
        ("x.json", b"[{]", ValueError, "not valid JSON"),
        ("x.json", b'[{"query": "q", "documents": ["d"], "target": "t"}, 3]', ValueError, r"\[1\]"),
        ("x.jsonl", b"\xff\xfe", ValueError, "cannot be read as text|not valid JSON"),
        ("x.jsonl.gz", b"plain", ValueError, "cannot be read as text"),
    ],
)
def test_missing_and_invalid_files_are_refused(
    tmp_path: Path, name, content, error, message
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_training_data(path)


def test_an_unreachable_data_set_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no/such-set: "):
        read_training_data("no/such-set")


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    corpus = {"a": "An apple a day. It keeps doctors away.", "b": "Bees", "c": "Cats", "d": "Dogs"}
    split = RetrievalSplit(
        {"1": "what keeps doctors away", "2": "who buzzes", "3": "nobody knows"},
        {"1": {"d": 0, "b": 1, "a": 2}, "2": {"b": 1}, "3": {"c": 0}},
    )
    return write_beir_folder(tmp_path / "beir", corpus, {"train": split})


def test_a_beir_folder_gives_judged_documents(beir: Path) -> None:
    rows = list(iterate_training_rows(beir, target_from="positive_sentence"))
    assert [row.as_json() for row in rows] == [
        {
            "query_id": "1",
            "query": "what keeps doctors away",
            "target": "It keeps doctors away.",
            "documents": ["An apple a day. It keeps doctors away.", "Bees", "Dogs"],
            "positive": [0, 1],
        },
        {
            "query_id": "2",
            "query": "who buzzes",
            "target": "Bees",
            "documents": ["Bees"],
            "positive": 0,
        },
    ]
    rows = list(iterate_training_rows(beir, target_from="query"))
    assert [(row.query, row.target) for row in rows] == [
        ("what keeps doctors away", "what keeps doctors away"),
        ("who buzzes", "who buzzes"),
    ]
    with pytest.raises(ValueError, match=r"query 1\): has no target; say with target_from"):
        list(iterate_training_rows(beir))
    with pytest.raises(FileNotFoundError, match=r"test\.tsv"):
        list(iterate_training_rows(beir, split="test", target_from="positive"))


@pytest.mark.parametrize("key", ["query_id", "_id", "query"])
def test_a_target_file_is_joined_by_id_or_query(
    beir: Path, tmp_path: Path, key: str, caplog
) -> None:
    keys = {"1": "What keeps  doctors away"} if key == "query" else {"1": 1}
    path = write_lines(tmp_path / "t.jsonl", {key: keys["1"], "answers": ["apples", "fruit"]})
    with caplog.at_level(logging.WARNING):
        (row,) = iterate_training_rows(beir, target_from=path)
    assert (row.query_id, row.target, row.answers) == ("1", "apples", ("apples", "fruit"))
    assert "names no target of 1 of 2 queries: left out" in caplog.text


def test_a_beir_folder_brings_its_target_file(beir: Path) -> None:
    write_lines(
        beir / "targets.jsonl", {"_id": "1", "target": "apples"}, {"_id": "2", "target": "bees"}
    )
    assert [row["target"] for row in read_training_data(beir)] == ["apples", "bees"]


def test_a_target_file_for_other_queries_is_refused(beir: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", {"query_id": "77", "target": "t"})
    with pytest.raises(ValueError, match=r"names none of the 2 queries, the first of them .*1\)"):
        list(iterate_training_rows(beir, target_from=path))
    write_lines(path, {"target": "t"})
    with pytest.raises(ValueError, match=r"t\.jsonl:1: has neither query_id nor query"):
        list(iterate_training_rows(beir, target_from=path))
    write_lines(path, {"query_id": "1", "text": "t"})
    with pytest.raises(ValueError, match=r"t\.jsonl:1: has no target; its keys are query_id, text"):
        list(iterate_training_rows(beir, target_from=path))


@pytest.mark.parametrize(
    "document, sentence",
    [
        ("Emma\nA novel of manners. It was written by Jane Austen. She was born in 1775.", 1),
        ("It was written somewhere. Austen wrote it in Chawton. It was written twice.", 1),
        ("Nothing here fits at all. Nor does it here again.", 0),
    ],
)
def test_the_sentence_with_the_words_of_the_query(document: str, sentence: int) -> None:
    sentences = [s for part in document.split("\n")[-1:] for s in part.split(". ")]
    found = sentence_nearest("where was it that Austen wrote, or had written, Emma?", document)
    assert found.rstrip(".") == sentences[sentence].rstrip(".")
