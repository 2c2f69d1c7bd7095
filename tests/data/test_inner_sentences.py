"""Rows from documents alone: a sentence asks, the next one is the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.inner_sentences import rows_of_sentences

SENTENCES = [
    "A title of the document",
    "The first sentence says what was asked in this study.",
    "The second one, e.g. of Smith et al. 2020, says how it was done.",
    "Short one.",
    "The third long sentence says what was found in the end.",
    "And the last of them all says what follows from that.",
]
TEXT = SENTENCES[0] + "\n" + " ".join(SENTENCES[1:])


def test_a_sentence_asks_and_the_next_one_is_the_target() -> None:
    seen = set()
    for seed in range(20):
        (row,) = rows_of_sentences([("a", TEXT)], seed)
        place = SENTENCES.index(row.query)
        seen.add(place)
        assert row.target == SENTENCES[place + 1] and row.positives == (0,)
        left = SENTENCES[:place] + SENTENCES[place + 2 :]
        assert row.documents[0].split() == " ".join(left).split()
        assert row.documents[0].startswith("A title of the document\n")
    # Neither a title nor a short sentence asks or answers.
    assert seen == {1, 4}
    assert list(rows_of_sentences([("a", TEXT)], 3)) == list(rows_of_sentences([("a", TEXT)], 3))


def test_documents_without_such_sentences_give_no_row() -> None:
    few = "A title of the document. " + SENTENCES[1] + " " + SENTENCES[2]
    rows = rows_of_sentences([("few", few), ("short", "A. B. C. D. E."), ("a", TEXT)])
    assert [row.where for row in rows] == ["a"]
    with pytest.raises(ValueError, match="few: no document has 4 sentences"):
        list(rows_of_sentences([("few", few)]))


def test_the_command_reads_a_collection(tmp_path: Path) -> None:
    source, output = tmp_path / "corpus.jsonl", tmp_path / "train.jsonl"
    title, _, text = TEXT.partition("\n")
    lines = [{"_id": f"d{i}", "title": title, "text": f"{text} Number {i}."} for i in range(3)]
    source.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["data", "prepare", str(source), "--output", str(output), "--ask"]
    result = CliRunner().invoke(app, [*arguments, "sentence"])
    assert result.exit_code == 0 and "3 lines of 3 documents" in result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row["query"] in SENTENCES and row["target"] in TEXT for row in rows)
    assert all(row["documents"][0].startswith(title) and row["positive"] == 0 for row in rows)
    result = CliRunner().invoke(app, [*arguments, "title"])
    assert result.exit_code != 0 and "--ask must be one of" in str(
        result.exception or result.output
    )
