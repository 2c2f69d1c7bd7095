"""The project's own form: ``query``, ``target`` or ``answers``, ``documents``, ``positive``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dream_kernels.parsing import shortened
from dream_training.data.training_row import (
    TrainingRow,
    answers_of,
    documents_of,
    make_row,
    query_id_of,
    target_of,
    text_of,
)

COLUMNS = "query, target or answers, documents"


def fits(columns: Collection[str]) -> bool:
    """Whether rows with these columns have this form."""
    return "documents" in columns


def parse(row: Mapping[str, Any], where: str) -> TrainingRow:
    """Read ``documents`` (texts or ``{"title": ..., "text": ...}``) and what is known of them.

    ``positive`` is ``true`` (the first document is relevant), an index, or a list of indices.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    documents = documents_of(row, "documents", where)
    return make_row(
        text_of(row, "query", where),
        documents,
        _positives(row.get("positive"), len(documents), where),
        target=target_of(row, where),
        answers=answers_of(row, where),
        query_id=query_id_of(row, where),
        where=where,
    )


def _positives(value: Any, documents: int, where: str) -> list[int]:
    if value is None or value is False or value == -1:
        return []
    if value is True:
        return [0]
    indices = value if isinstance(value, list) else [value]
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < documents:
            raise ValueError(
                f"{where}: positive must be true, false, an index in 0 .. {documents - 1} or a "
                f"list of them, got {shortened(value)}"
            )
    return indices
