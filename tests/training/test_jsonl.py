"""Training data as JSON lines: what is read, and bad lines named by file and line."""

from __future__ import annotations

import json

import pytest

from dream_training.data.jsonl import read_training_data, to_training_data

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
        ({**GOOD, "positive": 1}, r"positive must be true, false or an index in 0 \.\. 0, got 1"),
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
