"""The demo's batches, in which each query competes with similar documents and with random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def group_rows(texts: Sequence[str], group: int, groups: int, seed: int) -> list[list[int]]:
    """Split texts into batches of a few groups of neighbours each.

    Among random texts nearly every wrong one is easy to tell from the right one. So a group holds
    a random text and its nearest neighbours (cosine of TF-IDF) among the texts that are left; a
    batch holds several groups.

    Args:
        texts: to be split; those of an incomplete batch are left out.
        group: texts per group.
        groups: groups per batch.
        seed: of the order.

    Returns:
        Indices of the texts, batch by batch.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(texts)
    order = list(range(len(texts)))
    generator = random.Random(seed)
    generator.shuffle(order)
    left = np.ones(len(texts), dtype=bool)
    found: list[list[int]] = []
    for first in order:
        if not left[first]:
            continue
        similarity = (vectors @ vectors[first].T).toarray()[:, 0]
        similarity[~left] = -1.0
        similarity[first] = 2.0
        # Stable, so that equal texts come in the same order everywhere.
        nearest = np.argsort(-similarity, kind="stable")[:group].tolist()
        if left.sum() < group:
            break
        left[nearest] = False
        found.append(nearest)
    # The groups made last hold the leftovers.
    generator.shuffle(found)
    return [
        [row for own in found[i : i + groups] for row in own]
        for i in range(0, len(found) - groups + 1, groups)
    ]


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
