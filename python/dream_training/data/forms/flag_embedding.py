"""FlagEmbedding's form: ``query``, ``pos``, ``neg``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dream_training.data.training_row import (
    TrainingRow,
    answers_of,
    documents_of,
    make_row,
    query_id_of,
    target_of,
    text_of,
)

COLUMNS = "query, pos, neg"


def fits(columns: Collection[str]) -> bool:
    """Whether rows with these columns have this form."""
    return "pos" in columns


def parse(row: Mapping[str, Any], where: str) -> TrainingRow:
    """Read the texts of ``pos``, then those of ``neg``, if there are any.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    relevant = documents_of(row, "pos", where)
    others = documents_of(row, "neg", where, least=0)
    return make_row(
        text_of(row, "query", where),
        [*relevant, *others],
        range(len(relevant)),
        target=target_of(row, where),
        answers=answers_of(row, where),
        query_id=query_id_of(row),
        where=where,
    )
