"""The form of sentence-transformers: one text a column, ``anchor``, ``positive``, ``negative``."""

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

COLUMNS = "query or anchor, positive, negative, negative_2, ..."

_NEGATIVE = re.compile(r"negative(_\d+)?")


def fits(columns: Collection[str]) -> bool:
    """Whether rows with these columns have this form."""
    return "positive" in columns and ("query" in columns or "anchor" in columns)


def parse(row: Mapping[str, Any], where: str) -> TrainingRow:
    """Read the text of ``positive``, then those of every column ``negative...`` that has one.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    others = [name for name in row if _NEGATIVE.fullmatch(name) and row[name] is not None]
    return make_row(
        text_of(row, "query" if "query" in row else "anchor", where),
        [text_of(row, name, where) for name in ("positive", *others)],
        [0],
        target=target_of(row, where),
        answers=answers_of(row, where),
        query_id=query_id_of(row, where),
        where=where,
    )
