"""Batches of groups of similar texts."""

from __future__ import annotations

import random

from dream_training.data.neighbours import group_rows, order_by_neighbours


def test_batches_are_groups_of_neighbours() -> None:
    words = ("apple river stone", "cloud tiger lemon", "piano rocket garden", "violin mango owl")
    texts = [f"{own} {i}x" for own in words for i in range(6)]
    random.Random(0).shuffle(texts)
    batches = group_rows(texts, group=3, groups=2, seed=0)
    assert sorted(row for batch in batches for row in batch) == list(range(24))
    for batch in batches:
        for group in (batch[:3], batch[3:]):
            assert len({texts[row][:5] for row in group}) == 1
    assert batches == group_rows(texts, group=3, groups=2, seed=0)
    assert batches != group_rows(texts, group=3, groups=2, seed=1)
    # An incomplete batch is left out.
    assert len(group_rows(texts, group=5, groups=2, seed=0)) == 2
    order = order_by_neighbours(texts, group=5, batch_size=10, seed=0)
    assert order[:20] == [row for batch in group_rows(texts, 5, 2, seed=0) for row in batch]
    assert sorted(order) == list(range(24)) and order[20:] == sorted(order[20:])
