"""Batches in which each query competes with similar documents and with random ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


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


def order_by_neighbours(texts: Sequence[str], group: int, batch_size: int, seed: int) -> list[int]:
    """An order of all texts, of which every ``batch_size`` are a batch of :func:`group_rows`.

    Those that fill no batch come last.
    """
    batches = group_rows(texts, group, batch_size // group, seed)
    order = [row for batch in batches for row in batch]
    return order + sorted(set(range(len(texts))) - set(order))
