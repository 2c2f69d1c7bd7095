"""The statistics of a data set, against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.statistics import Lengths, describe, quantiles, token_lengths
from dream_training.data.training_row import make_row
from helpers.tiny import make_tokenizer

ROWS = [
    make_row("who wrote Emma", ["Emma is by Jane Austen", "A name, says Jane Austen", "Emma"], [0],
             target="Jane Austen", where="a:1"),
    make_row("Who wrote  Emma", ["Emma is by Jane Austen", "emma is  by Jane Austen"], [0],
             answers=["jane austen"], where="a:2"),
    make_row("a title", ["A title and its text", "other words here"], target="its text",
             where="a:3"),
    make_row("what", ["three little words", "what"], [0, 1], target="WHAT", where="a:4"),
    make_row("broken", ["caf\ufffd in the town"], [0], where="a:5"),
]  # fmt: skip


def test_lines_are_counted() -> None:
    result = describe(iter(ROWS))
    expected = {
        "lines": 5,
        "with_positive": 4,
        "with_several_positives": 1,
        "with_target": 4,
        "with_answers": 1,
        "repeated_queries": 1,
        "repeated_lines": 1,
        "repeated_candidates": 1,
        "documents": 8,
        "shared_documents": 1,
        # lines 1, 2 and 4 have a positive and a target; in line 4 the target is a positive
        "target_in_positive": 1.0,
        "target_in_other": round(1 / 3, 4),
        "target_in_candidate": 1.0,
        "query_begins_candidate": 0.4,
    }
    assert {key: result[key] for key in expected} == expected
    assert result["candidates"] == {"min": 1, "median": 2.0, "p90": 2.6, "max": 3, "mean": 1.8}


def test_suspicious_lines_are_named() -> None:
    assert describe(ROWS, bad_lines=["a:6: has no query"])["suspicious"] == {
        "candidate of fewer than 3 words": {"count": 2, "first": ["a:1", "a:4"]},
        "target equals query": {"count": 1, "first": ["a:4"]},
        "candidate equals query": {"count": 1, "first": ["a:4"]},
        "no target": {"count": 1, "first": ["a:5"]},
        "broken characters (U+FFFD)": {"count": 1, "first": ["a:5"]},
        "unreadable line": {"count": 1, "first": ["a:6: has no query"]},
    }


def test_lengths_and_what_is_cut() -> None:
    # A byte is a token.
    tokens = Lengths("tokens", token_lengths(make_tokenizer(), 1), {"query": 8, "target": 99})
    lengths = describe(ROWS, [tokens])["lengths"]
    assert lengths["words"]["query"]["max"] == 3 and "cut" not in lengths["words"]["query"]
    query = lengths["tokens"]["query"]
    sizes = [len(row.query) + 1 for row in ROWS]
    assert (query["min"], query["max"]) == (min(sizes), max(sizes))
    assert query["cut"] == 0.4 and query["limit"] == 8
    assert lengths["tokens"]["target"]["cut"] == 0.0
    assert "cut" not in lengths["tokens"]["document"]


def test_many_lines_are_measured_in_chunks() -> None:
    rows = [make_row(f"q {i}", [f"document {'x ' * i}"]) for i in range(1100)]
    lengths = describe(rows)["lengths"]["words"]
    assert lengths["document"]["max"] == 1100 and lengths["document"]["median"] == 550.5
    assert quantiles([1, 2, 3, 4, 90])["p90"] == pytest.approx(55.6)


def test_data_without_a_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="no line to describe; the first fault: x:1: has no query"):
        describe([], bad_lines=["x:1: has no query"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    lines = [row.as_json() for row in ROWS] + [{"query": "", "documents": ["d"]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_command_prints_tables_and_json(data: Path, tiny_model: Path) -> None:
    arguments = ["data", "stats", str(data), "--reader", str(tiny_model)]
    arguments += ["--retriever", str(tiny_model), "--query-max-len", "8"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"}, catch_exceptions=False)
    assert result.exit_code == 0
    for text in ("with a known positive", "4 (80.0%)", "query, tokens of the retriever", "40.0%"):
        assert text in result.stdout
    assert f"{data}:6: query must be a text that is not empty" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    printed = json.loads(result.stdout)
    assert printed["source"] == str(data) and printed["lines"] == 5
    reader, retriever = (printed["lengths"][f"tokens of the {m}"] for m in ("reader", "retriever"))
    # The retriever's end-of-sequence token counts.
    assert retriever["query"]["max"] == reader["query"]["max"] + 1
    assert "target" not in retriever and reader["target"]["limit"] == 32
    result = CliRunner().invoke(app, [*arguments, "--json", "--limit", "2"])
    assert json.loads(result.stdout)["lines"] == 2
