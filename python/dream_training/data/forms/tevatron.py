"""Tevatron's form: ``query``, ``positive_passages``, ``negative_passages``, perhaps ``answers``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dream_training.data.training_row import TrainingRow, answers_of, relevant_first

COLUMNS = "query, positive_passages, negative_passages"


def fits(columns: Collection[str]) -> bool:
    """Whether rows with these columns have this form."""
    return "positive_passages" in columns


def parse(row: Mapping[str, Any], where: str) -> TrainingRow:
    """Read passages, ``{"docid": ..., "title": ..., "text": ...}``, the relevant ones first.

    Some published sets have an empty list of answers if there are none.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    answers = answers_of(row, where) if row.get("answers") else ()
    return relevant_first(row, "positive_passages", "negative_passages", where, answers)
