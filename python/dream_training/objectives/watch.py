"""What a loss warns of in any trainer: training from which nothing can come."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from dream_training.models.precision import narrow_weights
from dream_training.objectives.accumulation import engine_of

# Batches without a choice; later ones are not looked at.
_BATCHES = 5


class TrainingWatch:
    """Warns once of trained weights in 16 bits, and of pools that leave nothing to choose."""

    def __init__(self) -> None:
        self._batches = 0
        self._choice = False

    def __call__(self, objective: Any, choices: Callable[[], int]) -> None:
        """Look at a batch of training.

        Args:
            objective: the loss, whose retriever is ``model``.
            choices: how many documents a query of the batch can give its weight to; it is not
                called for every batch, as it waits for the device.
        """
        self._batches += 1
        if self._batches == 1:
            _warn_of_narrow_weights(objective)
        if self._choice or self._batches > _BATCHES:
            return
        self._choice = choices() > 1
        if not self._choice and self._batches == _BATCHES:
            warnings.warn(
                f"{type(objective).__name__} has no gradient: in each of the first {_BATCHES} "
                "batches every query had one document to give its weight to. Raise the batch size, "
                "give each row several documents, or choose the default batch_sampler",
                stacklevel=3,
            )


def _warn_of_narrow_weights(objective: Any) -> None:
    narrow = narrow_weights(objective.parameters())
    # DeepSpeed holds copies in float32.
    if narrow and engine_of(objective.model) != "DeepSpeed":
        kind = str(narrow[0].dtype).removeprefix("torch.")
        warnings.warn(
            f"{type(objective).__name__} trains weights in {kind}, in which an update of less than "
            f"{0.5 * 2**-7 if kind == 'bfloat16' else 0.5 * 2**-10:.2%} of a weight is lost: load "
            "the retriever in float32 and set bf16=True in the trainer's arguments, unless the "
            "optimizer holds float32 copies",
            stacklevel=3,
        )
