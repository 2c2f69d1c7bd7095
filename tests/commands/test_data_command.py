"""``dream data prepare`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.jsonl import read_training_data


def prepare(*arguments: object):
    return CliRunner().invoke(
        app, ["data", "prepare", *map(str, arguments)], catch_exceptions=False
    )


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["data", "--help"])
    assert all(f"\n  {name} " in result.stdout for name in ("prepare", "stats", "targets"))


def test_another_form_becomes_ours(tmp_path: Path) -> None:
    source, output = tmp_path / "flag.jsonl", tmp_path / "out" / "train.jsonl"
    lines = [{"query": f"q{i}", "pos": [f"p{i}", "p"], "neg": ["n"]} for i in range(4)]
    source.write_text("\n".join(map(json.dumps, lines)))
    result = prepare(source, "--output", output, "--target-from", "positive", "--limit", 3)
    assert result.exit_code == 0 and result.stdout == f"3 lines: {output}\n"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[2] == {
        "query": "q2", "target": "p2", "documents": ["p2", "p", "n"], "positive": [0, 1],
    }  # fmt: skip
    direct = list(read_training_data(source, target_from="positive"))[:3]
    assert list(read_training_data(output)) == direct


def test_text_becomes_rows_of_the_asked_lengths(tiny_model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(" ".join(f"w{i}" for i in range(100, 200)))
    output = tmp_path / "train.jsonl"
    lengths = ["--passage-len", 10, "--query-len", 3, "--target-len", 4]
    assert prepare(texts, "--output", output, *lengths).exit_code == 0
    row = json.loads(output.read_text().splitlines()[0])
    assert (row["query"], row["target"]) == ("w110 w111 w112", "w113 w114 w115 w116")
    assert [len(d.split()) for d in row["documents"]] == [10, 10]
    # The same lengths in tokens: a word with its space has five.
    lengths = ["--passage-len", 50, "--query-len", 15, "--target-len", 20]
    again = prepare(texts, "--output", output, *lengths, "--tokenizer", tiny_model)
    assert again.exit_code == 0
    assert json.loads(output.read_text().splitlines()[0]) == row


def test_a_mistake_leaves_no_file(tmp_path: Path) -> None:
    source, output = tmp_path / "flag.jsonl", tmp_path / "train.jsonl"
    source.write_text('{"query": "q", "pos": ["p"]}\n{"query": "q"}\n')
    with pytest.raises(ValueError, match=r"flag\.jsonl:2: pos must be a list"):
        prepare(source, "--output", output, "--target-from", "positive")
    assert [path.name for path in tmp_path.iterdir()] == ["flag.jsonl"]
