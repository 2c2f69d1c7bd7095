"""Which documents the queries of a batch compete over."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

Candidates = tuple[list[str], int]


def choose_candidates(
    queries: Sequence[str],
    candidates: Sequence[Candidates],
    pool: str,
    documents_per_query: int | None = None,
    seed: int = 0,
) -> list[Candidates]:
    """Choose which of the rows' candidates join the pool.

    With ``in_batch`` a row gives one document: the one that is known to be relevant, or its first.
    Otherwise it gives all, or ``documents_per_query`` of them drawn at random; the relevant one, if
    known, is always kept. The draw depends on ``seed`` and on the queries of the batch and on
    nothing else: it changes from epoch to epoch with the order of the data, and a resumed run
    draws what it would have drawn.

    Args:
        queries: ``B`` texts.
        candidates: for each query its documents and the index of the relevant one, or -1.
        pool: one of :data:`~dream_training.choices.POOLS`.
        documents_per_query: how many candidates of a row are kept, or None for all.
        seed: of the draw.

    Returns:
        ``candidates``, cut; the order of the documents stays.

    Raises:
        ValueError: a query has no candidate, and the pool needs one of each.
    """
    for query, (documents, _) in zip(queries, candidates):
        if not documents and pool != "both":
            raise ValueError(f"pool {pool!r} needs a document of every query, {query!r} has none")
    if pool == "in_batch":
        return [
            ([documents[max(known, 0)]], 0 if known >= 0 else -1) for documents, known in candidates
        ]
    if documents_per_query is None:
        return list(candidates)
    generator = random.Random("\n".join([str(seed), *queries]))
    return [_draw(*own, documents_per_query, generator) for own in candidates]


def _draw(documents: list[str], known: int, count: int, generator: random.Random) -> Candidates:
    kept = [] if known < 0 else [known]
    taken = {documents[i] for i in kept}
    # Every text once, for a second copy would join the pool as one document with the first.
    others = [
        i for i, text in enumerate(documents) if text not in taken and documents.index(text) == i
    ]
    kept += generator.sample(others, min(count - len(kept), len(others)))
    kept.sort()
    return [documents[i] for i in kept], kept.index(known) if known >= 0 else -1


def build_pools(
    candidates: Sequence[Candidates], pool: str
) -> tuple[list[str], list[list[int]] | None, list[int]]:
    """Join the rows' candidates, every text once.

    Returns:
        The texts; for each query the indices of its own documents with ``mined``, else None for
        one pool that all queries share; and the place of each query's relevant document in its
        pool, or -1.

    Raises:
        ValueError: ``pool`` is ``mined`` and no query has two candidates to choose between.
    """
    place: dict[str, int] = {}
    pools, positives = [], []
    for documents, known in candidates:
        own = [place.setdefault(text, len(place)) for text in documents]
        pools.append(list(dict.fromkeys(own)))
        positives.append(own[known] if known >= 0 else -1)
    if pool != "mined":
        return list(place), None, positives
    if max(map(len, pools)) < 2:
        raise ValueError(
            "pool 'mined' needs queries with at least two candidates, and every query of a batch "
            "has one: mine some, or choose pool 'in_batch'"
        )
    positives = [own.index(i) if i >= 0 else -1 for own, i in zip(pools, positives)]
    return list(place), pools, positives


def pool_scores(
    scores: Tensor, pools: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Pick from the scores of all documents those of each query's pool.

    Args:
        scores: ``[B, N]``.
        pools: for each query the indices of its documents; None for all of them.

    Returns:
        ``[B, C]`` with ``C`` the size of the largest pool, ``-inf`` after the end of a smaller
        one, and ``[B, C]`` bool, true for the documents that are there; None if all are.
    """
    if pools is None:
        return scores, None
    size = max(map(len, pools))
    index = torch.tensor([[*own, *[-1] * (size - len(own))] for own in pools], device=scores.device)
    present = index >= 0
    picked = scores.gather(1, index.clamp(min=0)).masked_fill(~present, -torch.inf)
    return picked, None if bool(present.all()) else present
