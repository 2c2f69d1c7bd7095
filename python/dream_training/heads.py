"""Choosing the reader's heads that receive the scores."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

import torch

from dream_kernels import HeadFile
from dream_training.reader import Reader

NULL_QUERY = "N/A"


def select_heads(
    reader: Reader,
    examples: Sequence[tuple[str, str]],
    *,
    pool_size: int = 16,
    null_query: str = NULL_QUERY,
    data_name: str = "",
    reader_name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> HeadFile:
    """Rank all heads of the reader by their query-focused retrieval (QR) score.

    After QRHead (Zhang et al., EMNLP 2025): a head is good when a query makes it attend to the
    gold document, beyond what it attends to it anyway. With ``m(q, d)`` the attention that the
    tokens of query ``q`` give to document ``d`` on average,

        score(head) = mean over examples of  m(query, gold) - m(null query, gold).

    The queries of one pool are read with their documents in one pass, together with the null
    query, and no attention matrix is built.

    Args:
        reader: the reader; its own heads do not matter here.
        examples: ``(query, gold document)`` pairs; about 100 suffice.
        pool_size: candidate documents per pool, each the gold document of one query.
        null_query: the query that says nothing.
        data_name: recorded in the file.
        reader_name: recorded in the file.
        progress: called with (examples done, examples in all) after every pool.

    Returns:
        Every head, best first, with its score.

    Raises:
        ValueError: fewer than two examples, or a pool smaller than two.
    """
    if pool_size < 2:
        raise ValueError(f"pool_size must be at least 2, got {pool_size}")
    if len(examples) < 2:
        raise ValueError(f"examples must hold at least 2 pairs, got {len(examples)}")
    total, counted = None, 0
    for pool in _pools(examples, pool_size):
        documents = list(dict.fromkeys(document for _, document in pool))
        prefix = reader.read(documents)
        ids, mask, weights = reader.query_rows([*(query for query, _ in pool), null_query])
        mass = reader.injection.read_mass(
            weights, input_ids=ids, attention_mask=mask, document_prefix=prefix
        )
        gold = torch.tensor([documents.index(document) for _, document in pool])
        rows = torch.arange(len(pool))
        above_null = mass[:, rows, :, gold] - mass[:, -1][:, :, gold].permute(2, 0, 1)
        total = above_null.sum(0) if total is None else total + above_null.sum(0)
        counted += len(pool)
        if progress is not None:
            progress(counted, len(examples))
    assert total is not None
    scores = (total / counted).double()
    ranked = scores.flatten().argsort(descending=True, stable=True).tolist()
    heads = [divmod(index, scores.shape[1]) for index in ranked]
    return HeadFile(
        heads=heads,
        scores={(layer, head): round(scores[layer, head].item(), 6) for layer, head in heads},
        provenance={
            "criterion": "qr_mass: attention of the query's tokens to the gold document, minus "
            "that of the null query's",
            "reader": reader_name,
            "data": data_name,
            "examples": counted,
            "pool_size": pool_size,
            "null_query": null_query,
            "context": reader.context,
            "date": datetime.date.today().isoformat(),
        },
    )


def _pools(examples: Sequence[tuple[str, str]], pool_size: int) -> list[Sequence[tuple[str, str]]]:
    """Cut the examples into pools of ``pool_size``; a last pool of one joins the one before it."""
    pools = [examples[i : i + pool_size] for i in range(0, len(examples), pool_size)]
    if len(pools) > 1 and len(pools[-1]) == 1:
        pools[-2:] = [[*pools[-2], *pools[-1]]]
    return pools
