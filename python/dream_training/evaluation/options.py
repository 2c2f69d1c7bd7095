"""How retrievers are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluationOptions:
    """How tasks are evaluated.

    Attributes:
        split: ``qrels/<split>.tsv`` of BEIR folders and sets; mteb's tasks name their own.
        batch_size: texts encoded at once.
        query_max_len: tokens of a query; the model's own limit by default.
        passage_max_len: tokens of a document; the same.
        devices: one process for each of these devices; None for this process alone.
        cache_dir: where sets of BEIR are kept.
        keep_identical_ids: see :class:`~dream_training.evaluation.retrieval.RetrievalTask`; mteb's
            tasks decide for themselves unless it is set.
    """

    split: str = "test"
    batch_size: int = 32
    query_max_len: int | None = None
    passage_max_len: int | None = None
    devices: Sequence[str] | None = None
    cache_dir: Path | None = None
    keep_identical_ids: bool = False
