"""The target of a row: which text the reader predicts, if a form of data leaves a choice."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from dream_training.choices import TARGET_CHOICES
from dream_training.data.sources import read_rows
from dream_training.data.training_row import (
    TrainingRow,
    answers_of,
    id_text,
    keys_of,
    normalised,
    target_of,
)

logger = logging.getLogger(__name__)

_CHOICES_IN_WORDS = f"{', '.join(TARGET_CHOICES)} or the path of a file of targets"

# A target, and the answers if the file has them.
_Target = tuple[str, tuple[str, ...]]

# A shorter sentence is a heading or a list number.
_WORDS_OF_A_SENTENCE = 4


def choose_targets(
    rows: Iterable[TrainingRow], target_from: str | os.PathLike[str] | None = None
) -> Iterator[TrainingRow]:
    """Yield the rows with ``target`` filled.

    Args:
        rows: rows of any form.
        target_from: what the target is:

            - None: the row's own ``target``, or else its first answer;
            - ``answers``: the first answer, even if there is a target;
            - ``positive``: the first relevant document, of which the reader predicts the first
              ``target_max_len`` tokens;
            - ``positive_sentence``: the sentence of the first relevant document that shares the
              most words with the query;
            - ``query``: the query itself, which the reader predicts without having seen it: for
              questions without answers;
            - the path of a JSONL file whose lines have ``query_id`` (or ``_id``) or ``query``, and
              ``target``, ``answers`` or both. A row that is not in the file keeps its own target;
              rows without any are dropped, and their number is logged.

    Raises:
        ValueError: ``target_from`` is neither a choice nor a file, or a row lacks what it needs.
    """
    if target_from is None or str(target_from) in TARGET_CHOICES:
        return (
            replace(row, target=_chosen(row, None if target_from is None else str(target_from)))
            for row in rows
        )
    if not Path(target_from).is_file():
        raise ValueError(f"target_from must be {_CHOICES_IN_WORDS}, got {str(target_from)!r}")
    return _from_file(rows, Path(target_from))


def sentence_nearest(query: str, document: str) -> str:
    """Return the first sentence of ``document`` that shares the most words with ``query``.

    Words of up to three letters do not count, nor do sentences of fewer than four words if there
    are longer ones.
    """
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", document) if part.strip()]
    long = [part for part in sentences if len(part.split()) >= _WORDS_OF_A_SENTENCE]
    asked = _words(query)
    return max(long or sentences, key=lambda sentence: len(asked & _words(sentence)))


def _chosen(row: TrainingRow, choice: str | None) -> str:
    if choice is None:
        own = row.target or next(iter(row.answers), None)
        if own is None:
            raise ValueError(
                f"{row.where}: has no target; say with target_from where it comes from: "
                f"{_CHOICES_IN_WORDS}; or let a model write targets with: dream data targets"
            )
        return own
    if choice == "answers":
        if not row.answers:
            raise ValueError(f"{row.where}: has no answers, which target_from asks for")
        return row.answers[0]
    if choice == "query":
        return row.query
    if not row.positives:
        raise ValueError(
            f"{row.where}: has no known positive, whose text target_from={choice!r} takes"
        )
    document = row.documents[row.positives[0]]
    return document if choice == "positive" else sentence_nearest(row.query, document)


def _from_file(rows: Iterable[TrainingRow], path: Path) -> Iterator[TrainingRow]:
    by_id, by_query = _read_targets(path)
    total, without, first = 0, 0, ""
    for row in rows:
        total += 1
        named = by_id.get(row.query_id or "") or by_query.get(normalised(row.query))
        target, answers = named or (row.target or next(iter(row.answers), None), ())
        if target is None:
            without += 1
            first = first or row.where
            continue
        yield replace(row, target=target, answers=answers or row.answers)
    if without == total:
        raise ValueError(f"{path}: names none of the {total} queries, the first of them {first}")
    if without:
        logger.warning("%s names no target of %d of %d queries: left out", path, without, total)


def _read_targets(path: Path) -> tuple[dict[str, _Target], dict[str, _Target]]:
    """Return targets by query id and by query."""
    by_id: dict[str, _Target] = {}
    by_query: dict[str, _Target] = {}
    for where, row in read_rows(path):
        answers = answers_of(row, where)
        target = target_of(row, where) or next(iter(answers), None)
        if target is None:
            raise ValueError(f"{where}: has no target; its keys are {keys_of(row)}")
        key = id_text(row.get("query_id", row.get("_id")), "query_id", where)
        query = row.get("query")
        if key is None and not isinstance(query, str):
            raise ValueError(f"{where}: has neither query_id nor query to tell whose target it is")
        if key is not None:
            by_id.setdefault(key, (target, answers))
        if isinstance(query, str):
            by_query.setdefault(normalised(query), (target, answers))
    return by_id, by_query


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) > 3}
