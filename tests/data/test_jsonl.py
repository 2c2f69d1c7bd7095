"""Training data as JSON lines: what is read, and bad lines named by file and line."""

from __future__ import annotations

import json

import pytest

from dream_training.data.jsonl import (
    iterate_training_rows,
    read_training_data,
    stream_training_data,
    to_training_data,
    write_json_lines,
    write_training_rows,
)

GOOD = {"query": "q", "target": "t", "documents": ["d"]}


def write(tmp_path, *rows) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def test_every_form_is_read(tmp_path) -> None:
    path = write(
        tmp_path,
        {**GOOD, "positive": True},
        "",
        {"query": "q2", "answers": ["a1", "a2"], "documents": ["x", "y"], "positive": 1},
        {**GOOD, "documents": [{"title": "T", "text": "body"}, {"title": None, "text": "b"}]},
    )
    rows = list(read_training_data(path))
    assert rows == [
        {"query": "q", "target": "t", "documents": ["d"], "positive": 0},
        {"query": "q2", "target": "a1", "documents": ["x", "y"], "positive": 1},
        {"query": "q", "target": "t", "documents": ["T\nbody", "b"], "positive": -1},
    ]
    assert list(read_training_data(tmp_path)) == rows, "a folder stands for its train.jsonl"


def test_triples_become_training_data() -> None:
    assert list(to_training_data([("q", "t", "d")])) == [{**GOOD, "positive": 0}]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"target": "t", "documents": ["d"]}, "has no query; its keys are target, documents"),
        ({**GOOD, "query": " "}, "query must be a text that is not empty, got ' '"),
        ({**GOOD, "target": ""}, "target must be a text that is not empty"),
        ({"query": "q", "documents": ["d"]}, "has no target"),
        ({"query": "q", "answers": [], "documents": ["d"]}, "answers must be a list"),
        ({"query": "q", "target": "t"}, "documents must be a list of at least one"),
        ({**GOOD, "documents": []}, "documents must be a list of at least one"),
        ({**GOOD, "documents": ["d", 3]}, r"documents\[1\] must be a text.* got 3"),
        ({**GOOD, "positive": 1}, r"positive must be true, false, an index in 0 \.\. 0 .*, got 1"),
        ({**GOOD, "positive": [0, 1]}, r"or a list of them, got \[0, 1\]"),
        ({**GOOD, "target": None, "answers": ["a", ""]}, r"answers\[1\] must be a text"),
        ({**GOOD, "positive": "yes"}, "got 'yes'"),
        ("[1]", "a line must be an object, got list"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message: str) -> None:
    path = write(tmp_path, GOOD, row)
    with pytest.raises(ValueError, match=message) as error:
        read_training_data(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_an_empty_file_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no line"):
        read_training_data(write(tmp_path, ""))


def test_of_equal_documents_the_relevant_one_is_kept(tmp_path) -> None:
    path = write(
        tmp_path, {**GOOD, "documents": ["other", "the  Answer", "The answer", "x"], "positive": 2}
    )
    (row,) = read_training_data(path)
    assert row["documents"] == ["other", "the  Answer", "x"] and row["positive"] == 1


def test_of_several_relevant_documents_none_counts_as_irrelevant(tmp_path) -> None:
    path = write(tmp_path, {**GOOD, "documents": ["n", "p", "m", "o"], "positive": [3, 1]})
    first = list(read_training_data(path))
    assert [(r["documents"], r["positive"]) for r in first] == [(["o", "n", "m"], 0)]
    each = list(read_training_data(path, positives="each"))
    assert [r["documents"] for r in each] == [["o", "n", "m"], ["p", "n", "m"]]
    with pytest.raises(ValueError, match=r"positives must be one of .* got 'all'"):
        read_training_data(path, positives="all")


def test_a_stream_has_the_rows_of_the_data_set(tmp_path) -> None:
    rows = [{**GOOD, "query": f"q{i}", "positive": i % 2 == 0} for i in range(5)]
    path = write(tmp_path, *rows)
    stream = stream_training_data(path)
    assert list(stream) == list(read_training_data(path)) == list(stream)
    assert stream.column_names == read_training_data(path).column_names
    assert sorted(r["query"] for r in stream.shuffle(seed=1, buffer_size=3)) == [
        r["query"] for r in rows
    ]


def test_a_stream_names_the_bad_line_when_it_reaches_it(tmp_path) -> None:
    lines = iter(stream_training_data(write(tmp_path, GOOD, {**GOOD, "query": ""})))
    assert next(lines)["query"] == "q"
    with pytest.raises(ValueError, match=r"train\.jsonl:2: query must be a text"):
        next(lines)


def test_what_is_written_is_read_again(tmp_path) -> None:
    path = write(
        tmp_path,
        {**GOOD, "query_id": 7, "answers": ["a", "b"]},
        {"query": "ü", "answers": ["a"], "documents": ["x", "y", "z"], "positive": [2, 0]},
        {**GOOD, "positive": True},
    )
    rows = list(iterate_training_rows(path, need_target=False))
    copy = tmp_path / "deep" / "copy.jsonl"
    assert write_training_rows(copy, rows) == 3
    again = list(iterate_training_rows(copy, need_target=False))
    assert [r.as_json() for r in again] == [r.as_json() for r in rows]
    assert (again[0].query_id, again[1].positives, again[1].target) == ("7", (2, 0), None)
    assert "ü" in copy.read_text(encoding="utf-8"), "text stays legible"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def rows():
        yield {"query": "q"}
        raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        write_json_lines(path, rows())
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
