"""Rows from text alone: no candidate holds what is to be predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dream_training.data.jsonl import read_training_data
from dream_training.data.raw_text import TextLengths, count_tokens, rows_of_text
from helpers.tiny import make_tokenizer

SHORT = TextLengths(passage=6, query=2, target=3)


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def test_documents_and_questions_alternate() -> None:
    rows = list(rows_of_text([("a.txt", words(0, 28))], SHORT))
    assert [row.as_json() for row in rows] == [
        {
            "query": words(6, 8),
            "target": words(8, 11),
            "documents": [words(0, 6), words(11, 17)],
            "positive": 0,
        },
        {
            "query": words(17, 19),
            "target": words(19, 22),
            "documents": [words(11, 17), words(22, 28)],
            "positive": 0,
        },
    ]
    assert rows[0].where == "a.txt"


def test_no_candidate_of_any_row_holds_any_target() -> None:
    # Texts that share paragraphs, shifted, so that one's question is another's document.
    texts = [(str(k), words(5 * k, 5 * k + 120)) for k in range(6)] + [("again", words(0, 120))]
    rows = list(rows_of_text(texts, SHORT))
    assert len(rows) > 10
    questions = {f"{row.query} {row.target}" for row in rows}
    documents = {document for row in rows for document in row.documents}
    assert not questions & documents
    assert len(questions) == len(rows), "a question is asked once"
    for row in rows:
        assert not any(row.target in document for document in row.documents)


def test_a_candidate_with_the_target_in_it_is_left_out() -> None:
    # The previous paragraph has, word for word, the text to be predicted.
    text = "x A B  C y z q r a b c k l m n o p"
    (row,) = rows_of_text([("t", text)], SHORT)
    assert row.target == "a b c" and row.documents == ("k l m n o p",)


def test_pieces_end_with_a_sentence_and_keep_their_line_breaks() -> None:
    text = "One two\nthree four five. six seven eight. Nine ten eleven twelve."
    (row,) = rows_of_text([("t", text)], TextLengths(passage=6, query=2, target=2))
    assert row.documents[0] == "One two\nthree four five."
    assert (row.query, row.target) == ("six seven", "eight.")


def test_lengths_may_be_tokens() -> None:
    lengths = TextLengths(passage=12, query=4, target=8, count=count_tokens(make_tokenizer()))
    rows = list(rows_of_text([("t", words(0, 10) + " " + words(0, 10).upper())], lengths))
    # A byte is a token: " w0" is three of them.
    assert rows[0].documents[0] == "w0 w1 w2 w3"
    assert (rows[0].query, rows[0].target) == ("w4", "w5 w6 w7")


def test_scripts_without_spaces_are_cut_as_well() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(40))
    rows = list(rows_of_text([("t", text)], SHORT))
    assert rows[0].documents[0] == text[:6] and rows[0].query == text[6:8]


def test_files_and_lines_of_text_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.md").write_text(words(0, 300))
    (folder / "sub" / "a.txt").write_text(words(1000, 1300))
    (folder / "picture.png").write_bytes(b"\xff")
    from_files = list(read_training_data(folder))
    lines = tmp_path / "texts.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"text": words(a, a + 300), "url": "u"}) for a in (0, 1000))
    )
    assert list(read_training_data(lines)) == from_files and len(from_files) == 4
    assert list(read_training_data(folder / "b.md")) == from_files[:2]
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"c\.txt: not text in UTF-8"):
        read_training_data(folder)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no text is long enough for a passage of 6 and a quest"):
        list(rows_of_text([("t", words(0, 8))], SHORT))
    with pytest.raises(ValueError, match="query must be at least 1, got 0"):
        TextLengths(query=0)
