"""The order of the demo's batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def stream_batches(
    data: Dataset, batches: Sequence[Sequence[int]], steps: int, seed: int
) -> IterableDataset:
    """Return the rows of ``steps`` batches, one after the other.

    The trainer does not shuffle a stream, so the batches stay as they are. They come in the given
    order at first, and in another one in every later round.
    """
    rows = [row for batch in _rounds(batches, steps, seed) for row in batch]
    return data.select(rows).to_iterable_dataset()


def _rounds(batches: Sequence[Sequence[int]], steps: int, seed: int) -> Iterator[Sequence[int]]:
    order = list(batches)
    generator = random.Random(seed)
    for step in range(steps):
        if step and step % len(order) == 0:
            generator.shuffle(order)
        yield order[step % len(order)]
