"""Mined candidates for training rows: ranked high by a retriever, not known to be relevant."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dream_training.choices import MINED_CHOICES, check_at_least, check_choice
from dream_training.console import tracked
from dream_training.data.beir_folder import read_corpus
from dream_training.data.forms import beir
from dream_training.data.sources import read_rows
from dream_training.data.training_row import TrainingRow, document_text, make_row, normalised

# Ranks the documents of a corpus for queries, both by id: (queries, corpus, k) -> scores by id.
Rank = Callable[[Mapping[str, str], Mapping[str, str], int], Mapping[str, Mapping[str, float]]]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class MiningOptions:
    """What is mined.

    Attributes:
        per_query: at most so many new candidates for a row.
        first_rank: the first rank they are taken from, counted from 1; the top ranks are often
            relevant but not labelled so.
        last_rank: the last rank they are taken from.
        choose: ``random`` documents of these ranks, or the ``best``.
        exclude_answers: leave out documents in which an answer, or the target, occurs.
        keep_candidates: keep a row's other candidates, not only its known positives. If no
            positive is known they are always kept: one of them may be relevant.
        seed: of the random choice, which for a query does not depend on the other queries.

    Raises:
        ValueError: a value is out of range.
    """

    per_query: int = 7
    first_rank: int = 1
    last_rank: int = 100
    choose: str = "random"
    exclude_answers: bool = False
    keep_candidates: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("per_query", self.per_query, 1)
        if not 1 <= self.first_rank <= self.last_rank:
            raise ValueError(
                "first_rank and last_rank must be ranks from 1 on, the first not after the last, "
                f"got {self.first_rank} and {self.last_rank}"
            )
        check_choice("choose", self.choose, MINED_CHOICES)


@dataclass
class MiningCounts:
    """Counts of the ranked documents by outcome.

    Attributes:
        rows: training rows.
        mined: candidates that were added.
        itself: left out because they are the query itself: its text, or the document with its id.
        known_positives: left out because they are known to be relevant to the query.
        with_answer: left out because an answer occurs in them.
        repeated: left out because the row has an equal text already.
        short_rows: rows that got fewer than ``per_query``.
    """

    rows: int = 0
    mined: int = 0
    itself: int = 0
    known_positives: int = 0
    with_answer: int = 0
    repeated: int = 0
    short_rows: int = 0


def mine(
    rows: Sequence[TrainingRow],
    corpus: Iterable[str] | Mapping[str, str],
    rank: Rank,
    options: MiningOptions,
) -> tuple[list[TrainingRow], MiningCounts]:
    """Give every row candidates from a corpus.

    A document is known to be relevant to a query if any row with that query says so; texts are
    compared after :func:`~dream_training.data.training_row.normalised`. Equal texts of the corpus
    are searched once, blank ones not at all. If a query is a document too, as in duplicate
    questions, that document has no rank: neither one with the query's text nor, if the corpus has
    ids, the one with the query's id.

    Args:
        rows: training rows.
        corpus: document texts, by id if they have ids.
        rank: the retriever.
        options: what is mined.

    Returns:
        The rows, each with its positives, what it keeps of its other candidates, and then those
        mined, best first or in random order; and what was left out.

    Raises:
        ValueError: there is no document to mine from.
    """
    distinct: dict[str, str] = {}
    by_id = dict(corpus) if isinstance(corpus, Mapping) else {}
    for text in by_id.values() if isinstance(corpus, Mapping) else corpus:
        distinct.setdefault(normalised(text), text)
    distinct.pop("", None)
    if not distinct:
        raise ValueError("corpus must hold at least one document, got none")
    keys = dict(zip(map(str, range(len(distinct))), distinct))
    texts = dict(zip(keys, distinct.values()))
    # Equal queries are searched once: the key of a query is its text.
    queries = {query: query for query in dict.fromkeys(row.query for row in rows)}
    relevant: dict[str, set[str]] = {}
    for row in rows:
        known = relevant.setdefault(normalised(row.query), set())
        known.update(normalised(row.documents[i]) for i in row.positives)
    itself = [_itself(row, by_id) - relevant[normalised(row.query)] for row in rows]
    most = max((len(own & distinct.keys()) for own in itself), default=0)
    ranking = rank(queries, texts, options.last_rank + most)
    counts = MiningCounts(rows=len(rows))
    mined = []
    paired = zip(rows, itself)
    for row, own in tracked(paired, "choosing candidates", len(rows)):
        scores = ranking.get(row.query, {})
        # Ties in the order of the corpus, regardless of the order of the search.
        found = sorted(scores, key=lambda key: (-scores[key], int(key)))
        order = [key for key in found if keys[key] not in own]
        counts.itself += len(found) - len(order)
        ranked = order[options.first_rank - 1 : options.last_rank]
        kept = _own_documents(row, options.keep_candidates)
        known = relevant[normalised(row.query)]
        allowed = _allowed(row, kept, [(k, keys[k]) for k in ranked], known, options, counts)
        if options.choose == "random":
            random.Random(f"{options.seed}:{row.query}").shuffle(allowed)
        chosen = [texts[key] for key in allowed[: options.per_query]]
        counts.mined += len(chosen)
        counts.short_rows += len(chosen) < options.per_query
        mined.append(
            make_row(
                row.query,
                [*kept, *chosen],
                range(len(row.positives)),
                target=row.target,
                answers=row.answers,
                query_id=row.query_id,
                where=row.where,
            )
        )
    return mined, counts


def read_documents(
    corpus: str | None, data: str, rows: Iterable[TrainingRow]
) -> dict[str, str] | list[str]:
    """Return the documents to mine from, by id if they come from a corpus.

    Args:
        corpus: a BEIR folder, or a file of lines with ``text`` and perhaps ``title``; None for
            the corpus of ``data`` if that is a BEIR folder, otherwise the documents of its rows.
        data: the training data.
        rows: its rows.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a line is not valid.
    """
    if corpus is None and not beir.fits(Path(data)):
        return [document for row in rows for document in row.documents]
    source = Path(corpus or data)
    if source.is_dir():
        return read_corpus(source)
    documents: dict[str, str] = {}
    for where, row in read_rows(corpus or data):
        key = str(row.get("_id", where))
        # No line is lost if several share an id.
        documents[where if key in documents else key] = document_text(row, "text", where)
    return documents


def holds_answer(document: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers occurs in the document as whole words, ignoring case."""
    words = _words(document)
    return any(_words(answer) in words for answer in answers if _words(answer).strip())


def _itself(row: TrainingRow, corpus: Mapping[str, str]) -> set[str]:
    """The texts that count as the query itself, normalised."""
    texts = {normalised(row.query)}
    if row.query_id is not None and row.query_id in corpus:
        texts.add(normalised(corpus[row.query_id]))
    return texts


def _own_documents(row: TrainingRow, keep_candidates: bool) -> list[str]:
    """The row's own documents that are kept, the relevant ones first."""
    known = [row.documents[i] for i in row.positives]
    if known and not keep_candidates:
        return known
    return known + [text for i, text in enumerate(row.documents) if i not in row.positives]


def _allowed(
    row: TrainingRow,
    kept: Sequence[str],
    ranked: Iterable[tuple[str, str]],
    known: set[str],
    options: MiningOptions,
    counts: MiningCounts,
) -> list[str]:
    answers = row.answers or ((row.target,) if row.target else ())
    present = set(map(normalised, kept))
    allowed = []
    for key, text in ranked:
        if text in known:
            counts.known_positives += 1
        elif text in present:
            counts.repeated += 1
        elif options.exclude_answers and holds_answer(text, answers):
            counts.with_answer += 1
        else:
            allowed.append(key)
    return allowed


def _words(text: str) -> str:
    words = " ".join(_WORD.findall(text.casefold()))
    return f" {words} "
