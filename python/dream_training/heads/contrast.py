"""How the reader's loss depends on the weights: all on the right document, uniform, on a wrong one.

A retriever can learn from the loss only what the loss can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dream_training.console import tracked
from dream_training.heads.selection import HEAD_POOL, HeadExample, make_pools
from dream_training.reading.reader import Reader

# Far below every other score, yet finite: mode "bias" adds it to attention logits.
_NOTHING = -1e4


@dataclass(frozen=True)
class Contrast:
    """Mean target loss of each query, ``[B]`` in nats per token.

    Attributes:
        right: all weight on the document known to be relevant.
        uniform: equal weights.
        wrong: all weight on another query's document.
        plain: without scores.
    """

    right: Tensor
    uniform: Tensor
    wrong: Tensor
    plain: Tensor

    def means(self) -> dict[str, float]:
        """The mean of each over the queries."""
        return {name: float(losses.mean()) for name, losses in vars(self).items()}

    def gap(self) -> tuple[float, float]:
        """Mean of ``wrong - right`` over the queries, and its standard error."""
        return _mean_and_error(self.wrong - self.right)

    def gain(self) -> tuple[float, float]:
        """Mean of ``uniform - right`` over the queries, and its standard error."""
        return _mean_and_error(self.uniform - self.right)


@torch.no_grad()
def measure_contrast(
    reader: Reader, examples: Sequence[HeadExample], pool_size: int = HEAD_POOL
) -> Contrast:
    """Measure the four losses in pools of the examples' relevant documents.

    Args:
        reader: the reader with its heads.
        examples: at least two, all with a known positive, of at least two documents.
        pool_size: examples per pool.

    Raises:
        ValueError: an example has no positive, or a pool has only one document.
    """
    parts = []
    pools = make_pools(examples, pool_size)
    for pool in tracked(pools, "measuring the losses: pools", len(pools)):
        if any(example.positive < 0 for example in pool):
            raise ValueError("every example must have a known positive")
        documents = list(dict.fromkeys(example.gold for example in pool))
        if len(documents) < 2:
            raise ValueError("a pool must hold at least 2 different documents, got 1")
        gold = torch.tensor([documents.index(example.gold) for example in pool])
        prefix = reader.read(documents)
        queries = [example.query for example in pool]
        targets = [example.target for example in pool]
        uniform = torch.zeros(len(pool), len(documents))
        losses = [
            reader(prefix, queries, targets, scores).query_losses.cpu()
            for scores in (
                all_weight_on(gold, len(documents)),
                uniform,
                all_weight_on((gold + 1) % len(documents), len(documents)),
            )
        ]
        heads = reader.injection.heads
        try:
            reader.injection.use_heads({})
            losses.append(reader(prefix, queries, targets, uniform).query_losses.cpu())
        finally:
            reader.injection.use_heads(heads)
        parts.append(torch.stack(losses))
    return Contrast(*torch.cat(parts, dim=1))


@torch.no_grad()
def single_document_losses(
    reader: Reader, queries: Sequence[str], targets: Sequence[str], documents: Sequence[str]
) -> Tensor:
    """Return each query's mean target loss with all weight on each document, ``[B, C]``."""
    prefix = reader.read(documents)
    places = torch.arange(len(documents))
    return torch.stack(
        [
            reader(
                prefix, queries, targets, all_weight_on(place.expand(len(queries)), len(documents))
            ).query_losses.cpu()
            for place in places
        ],
        dim=1,
    )


def all_weight_on(places: Tensor, documents: int) -> Tensor:
    """Scores ``[B, documents]`` that give all weight to ``places [B]``."""
    scores = torch.full((len(places), documents), _NOTHING)
    scores[torch.arange(len(places)), places] = 0.0
    return scores


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    deviation = values.std().item() if len(values) > 1 else float("inf")
    return values.mean().item(), deviation / len(values) ** 0.5
