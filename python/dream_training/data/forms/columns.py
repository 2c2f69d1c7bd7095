"""The form of sentence-transformers: one text a column, ``anchor``, ``positive``, ``negative``.

``question`` and ``query``, and ``document`` or ``passage`` for the relevant one, are other names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from dream_training.data.training_row import (
    TrainingRow,
    answers_of,
    make_row,
    query_id_of,
    target_of,
    text_of,
)

_QUERY = ("query", "anchor", "question")
_POSITIVE = ("positive", "document", "passage")
COLUMNS = f"{' or '.join(_QUERY)}, {' or '.join(_POSITIVE)}, negative, negative_2, ..."

_NEGATIVE = re.compile(r"negative(_\d+)?")


def fits(columns: Collection[str]) -> bool:
    """Whether rows with these columns have this form."""
    return _name(_QUERY, columns) is not None and _name(_POSITIVE, columns) is not None


def parse(row: Mapping[str, Any], where: str) -> TrainingRow:
    """Read the text of the relevant document, then those of the columns ``negative...``, if any.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    query, positive = _name(_QUERY, row), _name(_POSITIVE, row)
    assert query is not None and positive is not None
    others = [name for name in row if _NEGATIVE.fullmatch(name) and row[name] is not None]
    return make_row(
        text_of(row, query, where),
        [text_of(row, name, where) for name in (positive, *others)],
        [0],
        target=target_of(row, where),
        answers=answers_of(row, where),
        query_id=query_id_of(row, where),
        where=where,
    )


def _name(names: Collection[str], columns: Collection[str]) -> str | None:
    """The first of the names that is a column."""
    return next((name for name in names if name in columns), None)
