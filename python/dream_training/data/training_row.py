"""One row of training data, the same for every form, and the checks that all forms share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dream_kernels.parsing import shortened, why_not_name, why_not_text


@dataclass(frozen=True)
class TrainingRow:
    """A query, what the reader is to predict, and candidate documents.

    Attributes:
        query: text, not blank.
        documents: candidate texts, at least one, no two of them equal under :func:`normalised`.
        target: the text to predict, or None if there is none.
        answers: accepted answers, the first of which is the target if there is no other.
        positives: indices of the documents known to be relevant, the main one first.
        query_id: the query's id, if there is one.
        repeated: number of documents left out because they equal another one.
        where: file and line, for messages.
    """

    query: str
    documents: tuple[str, ...]
    target: str | None = None
    answers: tuple[str, ...] = ()
    positives: tuple[int, ...] = ()
    query_id: str | None = None
    repeated: int = 0
    where: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the row in the project's own form, as ``dream train`` reads it."""
        row: dict[str, Any] = {} if self.query_id is None else {"query_id": self.query_id}
        row["query"] = self.query
        if self.target is not None:
            row["target"] = self.target
        if self.answers:
            row["answers"] = list(self.answers)
        row["documents"] = list(self.documents)
        if self.positives:
            known = list(self.positives)
            row["positive"] = known[0] if len(known) == 1 else known
        return row


def make_row(
    query: str,
    documents: Iterable[str],
    positives: Iterable[int] = (),
    *,
    target: str | None = None,
    answers: Iterable[str] = (),
    query_id: str | None = None,
    where: str = "",
) -> TrainingRow:
    """Build a row without repeated documents.

    Of documents that are equal under :func:`normalised` the first is kept, and it is relevant if
    any of them is: no document is both relevant and among the others.
    """
    places: dict[str, int] = {}
    kept: list[str] = []
    place_of = []
    for document in documents:
        place = places.setdefault(normalised(document), len(kept))
        if place == len(kept):
            kept.append(document)
        place_of.append(place)
    known = dict.fromkeys(place_of[index] for index in positives)
    return TrainingRow(
        query,
        tuple(kept),
        target,
        tuple(answers),
        tuple(known),
        query_id,
        len(place_of) - len(kept),
        where,
    )


def normalised(text: str) -> str:
    """Return ``text`` with case and white space normalised; two texts are equal if this is."""
    return " ".join(text.casefold().split())


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text under ``key``.

    Raises:
        ValueError: there is no such key, or its value is not text or is blank.
    """
    if key not in row:
        raise ValueError(f"{where}: has no {key}; its keys are {keys_of(row)}")
    return check_text(row[key], key, where)


def check_text(value: Any, name: str, where: str) -> str:
    """Return ``value`` if it is text and not blank.

    Raises:
        ValueError: it is not, or has a lone surrogate; the message has ``where`` and ``name``.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{where}: {name} must be a text that is not empty, got {shortened(value)}"
        )
    if (reason := why_not_text(value)) is not None:
        raise ValueError(f"{where}: {name} is no text: {reason}")
    return value


def target_of(row: Mapping[str, Any], where: str) -> str | None:
    """Return the text under ``target``, or None if the key is missing or null."""
    return None if row.get("target") is None else text_of(row, "target", where)


def answers_of(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the texts under ``answers``; none if the key is missing or null.

    An empty list is an error unless there is a target.
    """
    answers = row.get("answers")
    if answers is None or (answers == [] and row.get("target") is not None):
        return ()
    if not isinstance(answers, list) or not answers:
        short = shortened(answers)
        raise ValueError(f"{where}: answers must be a list of at least one text, got {short}")
    return tuple(check_text(text, f"answers[{i}]", where) for i, text in enumerate(answers))


def query_id_of(row: Mapping[str, Any], where: str) -> str | None:
    """Return the id under ``query_id``, as text, or None if the row has none.

    Raises:
        ValueError: it is neither text nor a number.
    """
    return id_text(row.get("query_id"), "query_id", where)


def id_text(value: Any, name: str, where: str) -> str | None:
    """Return an id as text: ``value`` itself, the digits of a number, or None for None.

    Raises:
        ValueError: it is neither, or not valid text; the message has ``where`` and ``name``.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text or a number, got {shortened(value)}")
    if (reason := why_not_name(value)) is not None:
        raise ValueError(f"{where}: {name} is no text: {reason}")
    return value


def keys_of(row: Mapping[str, Any]) -> str:
    """Return the names of a row's keys, for messages."""
    names = [shortened(key)[1:-1] if len(key) > 40 else key for key in list(row)[:20]]
    more = f" and {len(row) - 20} more" if len(row) > 20 else ""
    return (", ".join(names) or "none") + more


def documents_of(row: Mapping[str, Any], key: str, where: str, *, least: int = 1) -> list[str]:
    """Return the texts of the list under ``key``; a title precedes its text on a line of its own.

    Raises:
        ValueError: there is no list, fewer than ``least`` entries, or one that is neither a text
            nor ``{"title": ..., "text": ...}``.
    """
    values = row.get(key)
    if values is None and not least:
        return []
    if not isinstance(values, list) or len(values) < least:
        expected = "a list of at least one candidate" if least else "a list"
        raise ValueError(f"{where}: {key} must be {expected}, got {shortened(values)}")
    return [document_text(value, f"{key}[{i}]", where) for i, value in enumerate(values)]


def relevant_first(
    row: Mapping[str, Any], relevant: str, others: str, where: str, answers: Sequence[str]
) -> TrainingRow:
    """Make a row of the relevant documents under one key, then those under another, if any.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    known = documents_of(row, relevant, where)
    rest = documents_of(row, others, where, least=0)
    return make_row(
        text_of(row, "query", where),
        [*known, *rest],
        range(len(known)),
        target=target_of(row, where),
        answers=answers,
        query_id=query_id_of(row, where),
        where=where,
    )


def document_text(value: Any, name: str, where: str) -> str:
    """Return a document, a text or ``{"title": ..., "text": ...}``, as one text.

    Raises:
        ValueError: it is neither, or blank; the message has ``where`` and ``name``.
    """
    if isinstance(value, dict):
        title, text = (
            check_text(value[key], f"{name}[{key!r}]", where) if value.get(key) else ""
            for key in ("title", "text")
        )
        value = f"{title}\n{text}" if title and text else title or text
    return check_text(value, name, where)
