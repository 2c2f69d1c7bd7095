"""FlagEmbedding's form: ``query``, ``pos``, ``neg``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dream_training.data.training_row import TrainingRow, answers_of, relevant_first

COLUMNS = "query, pos, neg"


def fits(columns: Collection[str]) -> bool:
    """Whether rows with these columns have this form."""
    return "pos" in columns


def parse(row: Mapping[str, Any], where: str) -> TrainingRow:
    """Read the texts of ``pos``, then those of ``neg``, if there are any.

    Raises:
        ValueError: the row is not valid; the message begins with ``where``.
    """
    return relevant_first(row, "pos", "neg", where, answers_of(row, where))
