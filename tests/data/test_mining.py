"""Mined candidates: which ranks, what is left out, and equal results with equal seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.beir_folder import write_beir_folder
from dream_training.data.jsonl import read_training_data
from dream_training.data.mining import MiningOptions, holds_answer, mine
from dream_training.data.training_row import make_row
from dream_training.demo.docstrings import RetrievalSplit

CORPUS = [f"document {i}" for i in range(10)]


def words(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def in_order(queries, corpus, k):
    """Rank the corpus in its own order, with ties, which a search may return in any order."""
    best = list(corpus)[:k]
    return {q: {key: -float(int(key) // 2) for key in reversed(best)} for q in queries}


def test_ranks_are_counted_before_anything_is_left_out() -> None:
    row = make_row("q", ["Document  2"], [0], target="t")
    options = MiningOptions(per_query=3, first_rank=2, last_rank=5, choose="best")
    (mined,), counts = mine([row], CORPUS, in_order, options)
    assert mined.documents == ("Document  2", "document 1", "document 3", "document 4")
    assert mined.positives == (0,) and mined.target == "t"
    assert (counts.mined, counts.known_positives, counts.short_rows) == (3, 1, 0)


def test_a_query_that_is_a_document_is_no_candidate_and_has_no_rank() -> None:
    rows = [
        make_row("Document  1", ["p"], [0], query_id="a"),  # its text
        make_row("something", ["p"], [0], query_id="d2"),  # its id
        make_row("other", ["document 0"], [0], query_id="d0"),  # a positive of the same id
        make_row("more", ["p"], [0], query_id="none"),
    ]
    corpus = {f"d{i}": text for i, text in enumerate(CORPUS)}
    options = MiningOptions(per_query=9, last_rank=3, choose="best")
    mined, counts = mine(rows, corpus, in_order, options)
    assert [row.documents[1:] for row in mined] == [
        ("document 0", "document 2", "document 3"),
        ("document 0", "document 1", "document 3"),
        ("document 1", "document 2"),
        ("document 0", "document 1", "document 2"),
    ]
    assert (counts.itself, counts.known_positives) == (2, 1)
    # Texts alone have no ids.
    assert mine(rows[1:2], CORPUS, in_order, options)[1].itself == 0


def test_a_positive_of_another_line_with_the_query_is_no_candidate() -> None:
    rows = [make_row("q", ["document 0"], [0]), make_row("Q", ["document 1"], [0])]
    options = MiningOptions(per_query=9, last_rank=4, choose="best")
    mined, counts = mine(rows, CORPUS, in_order, options)
    assert [row.documents[1:] for row in mined] == [("document 2", "document 3")] * 2
    assert (counts.known_positives, counts.short_rows) == (4, 2)


def test_candidates_stay_if_no_positive_is_known_or_on_request() -> None:
    rows = [make_row("a", ["x", "document 0"]), make_row("b", ["x", "y", "z"], [1])]
    options = MiningOptions(per_query=1, choose="best")
    mined, counts = mine(rows, CORPUS, in_order, options)
    assert mined[0].documents == ("x", "document 0", "document 1") and mined[0].positives == ()
    assert mined[1].documents == ("y", "document 0") and mined[1].positives == (0,)
    assert counts.repeated == 1
    options = MiningOptions(per_query=1, choose="best", keep_candidates=True)
    assert mine(rows, CORPUS, in_order, options)[0][1].documents == ("y", "x", "z", "document 0")


def test_documents_with_an_answer_may_be_left_out() -> None:
    rows = [
        make_row("q", ["p"], [0], target="unused", answers=["Document, 3", "nowhere"]),
        make_row("r", ["p"], [0], target="document 1"),
    ]
    options = MiningOptions(per_query=4, last_rank=4, choose="best", exclude_answers=True)
    mined, counts = mine(rows, CORPUS, in_order, options)
    assert mined[0].documents[1:] == ("document 0", "document 1", "document 2")
    assert mined[1].documents[1:] == ("document 0", "document 2", "document 3")
    assert counts.with_answer == 2


@pytest.mark.parametrize(
    "answer, found",
    [("jane austen", True), ("Austen's", True), ("aust", False), ("1775", False), ("?!", False)],
)
def test_an_answer_is_found_word_by_word(answer: str, found: bool) -> None:
    assert holds_answer("By Jane\nAusten's hand, in 17755.", [answer]) is found


def test_equal_and_blank_texts_of_the_corpus_count_once() -> None:
    corpus = ["a", "A ", " ", "b"]
    (mined,), counts = mine([make_row("q", ["p"], [0])], corpus, in_order, MiningOptions())
    assert sorted(mined.documents[1:]) == ["a", "b"] and counts.repeated == 0
    with pytest.raises(ValueError, match="corpus must hold at least one document"):
        mine([make_row("q", ["p"])], [" "], in_order, MiningOptions())


def test_a_random_choice_depends_only_on_seed_and_query() -> None:
    rows = [make_row(f"q{i}", ["p"], [0]) for i in range(4)]

    def chosen(rows, seed):
        options = MiningOptions(per_query=3, seed=seed)
        return {row.query: row.documents for row in mine(rows, CORPUS, in_order, options)[0]}

    first = chosen(rows, 0)
    assert chosen(rows[::-1], 0) == first and chosen(rows[1:2], 0)["q1"] == first["q1"]
    assert chosen(rows, 1) != first and len(set(first.values())) > 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"per_query": 0}, "per_query must be at least 1"),
        ({"first_rank": 9, "last_rank": 3}, "the first not after the last, got 9 and 3"),
        ({"choose": "worst"}, r"choose must be one of .* got 'worst'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiningOptions(**options)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    words = ("apple", "river", "stone", "cloud", "tiger")
    corpus = {
        f"{word}{i}": f"Note {i} on the {word}: all of {word} is here."
        for word in words
        for i in range(4)
    }
    queries = {word: f"what is the {word}" for word in words}
    qrels = {word: {f"{word}2": 1} for word in words}
    folder = write_beir_folder(tmp_path / "beir", corpus, {"train": RetrievalSplit(queries, qrels)})
    lines = [json.dumps({"_id": word, "target": f"note 2 on {word}"}) for word in words]
    (folder / "targets.jsonl").write_text("\n".join(lines))
    return folder


def test_the_command_mines_by_bm25(beir: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.jsonl"
    arguments = ["mine", str(beir), "--output", str(output), "--per-query", "3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "15 candidates for 5 lines, of ranks 1 to 100" in result.stdout
    assert "Left out: 0 times the query itself, 5 known positives" in words(result.stdout)
    rows = list(read_training_data(output))
    assert [row["target"] for row in rows] == [
        f"note 2 on {w}" for w in ("apple", "river", "stone", "cloud", "tiger")
    ]
    for row in rows:
        word = row["query"].split()[-1]
        assert row["documents"][row["positive"]].startswith(f"Note 2 on the {word}")
        assert len(row["documents"]) == 4 and all(word in text for text in row["documents"])
    account = json.loads((tmp_path / "mined.provenance.json").read_text())
    assert account["retriever"] == "bm25" and account["bm25s"] and account["counts"]["mined"] == 15
    assert len(account["corpus_sha256"]) == 64 and account["documents"] == 20
    before = output.read_bytes()
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert output.read_bytes() == before


@pytest.mark.parametrize("corpus", ([], ["--corpus", "corpus.jsonl"]))
def test_the_command_takes_no_query_for_its_own_negative(tmp_path: Path, corpus) -> None:
    queries = {f"q{i}": f"why is {w} so {w}" for i, w in enumerate(("red", "blue", "low"))}
    documents = {q: f"A title {text}" for q, text in queries.items()}  # not the text alone
    documents |= {f"d{q}": f"{text} again" for q, text in queries.items()}
    split = RetrievalSplit(queries, {q: {f"d{q}": 1} for q in queries})
    folder = write_beir_folder(tmp_path / "beir", documents, {"train": split})
    output = tmp_path / "mined.jsonl"
    arguments = [str(folder), "--output", str(output), "--target-from", "positive"]
    arguments += [part.replace("corpus.", f"{folder}/corpus.") for part in corpus]
    result = CliRunner().invoke(app, ["mine", *arguments], catch_exceptions=False)
    assert "Left out: 3 times the query itself, 3 known positives" in words(result.stdout)
    for line in output.read_text().splitlines():
        row = json.loads(line)
        assert len(row["documents"]) == 5 and f"A title {row['query']}" not in row["documents"]


def test_the_command_mines_by_a_model_from_a_corpus_of_its_own(
    tiny_model: Path, beir: Path, tmp_path: Path
) -> None:
    from dream_training.models.retriever import build_retriever, save_retriever

    checkpoint = tmp_path / "best"
    save_retriever(build_retriever(tiny_model, max_len=32, device="cpu"), checkpoint)
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"title": f"T{i}", "text": f"Some text {i}"} for i in range(6)]
    corpus.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "mined.jsonl"
    result = CliRunner().invoke(
        app,
        [
            "mine", str(beir), "--output", str(output), "--corpus", str(corpus), "--device", "cpu",
            "--retriever", str(checkpoint), "--last-rank", "4", "--choose", "best",
        ],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(len(row["documents"]) == 5 for row in rows)
    assert all(text.startswith("T") for row in rows for text in row["documents"][1:])
    assert "5 lines got fewer than 7" in result.stdout
    account = json.loads((tmp_path / "mined.provenance.json").read_text())
    assert account["retriever"] == str(checkpoint) and account["sentence-transformers"]
