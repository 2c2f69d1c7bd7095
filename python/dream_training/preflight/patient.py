"""What the doctor looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from dream_kernels import HeadFile
    from dream_training.config import TrainConfig
    from dream_training.reading.reader import Reader


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        config: the run.
        data: some of its training data.
        model: the untrained retriever.
        heads: the reader's heads, None where the objective uses none.
        reader: the reader with them, None where the objective uses none.
        training_data: what steps are taken on, ``data`` if None.
    """

    config: TrainConfig
    data: Dataset
    model: SentenceTransformer
    heads: HeadFile | None = None
    reader: Reader | None = None
    training_data: Dataset | None = None
