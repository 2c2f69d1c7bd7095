"""Criteria that look at what the query's tokens attend to: the QR score and its ranking.

After QRHead (Zhang et al., EMNLP 2025). With ``a(q, t)`` the mean attention from the tokens of
query ``q`` to the token ``t`` of a document, the calibrated score of the token is

    s(t) = a(q, t) - a(null query, t),

and a document's score in a head is the sum over its tokens. QRHead drops the tokens of a document
whose ``s(t)`` is below ``mean - 2 std`` of that document's tokens before it sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dream_kernels import Prefix
from dream_training.reading.reader import Reader

NDCG_CUTOFF = 10
_FILTER_DEVIATIONS = 2.0
# Attention probabilities of one pass and layer, when every token counts as a document: 64 MiB.
_MASS_ELEMENTS = 2**24


def calibrated_mass(
    reader: Reader,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    null_query: str,
    token_filter: bool,
) -> Tensor:
    """Return the calibrated score of every document in every head.

    The documents are read once; queries and null query follow in one pass, or in a few with
    ``token_filter``. No attention matrix over all rows is built.

    Args:
        reader: the reader; its own heads do not matter here.
        queries: ``B`` texts.
        documents: ``C`` texts, one pool for all queries.
        null_query: a query without content.
        token_filter: drop the tokens whose score is far below their document's mean.

    Returns:
        ``[layers, B, Hq, C]`` float32 on the CPU.
    """
    prefix = reader.read(documents)
    texts = [*queries, null_query]
    if not token_filter:
        mass = _mass(reader, texts, prefix, prefix.spans)
        return mass[:, :-1] - mass[:, -1:]
    spans = prefix.spans[0].cpu()
    tokens = torch.cat([torch.arange(start, end) for start, end in spans.tolist()])
    owner = torch.repeat_interleave(torch.arange(len(spans)), spans[:, 1] - spans[:, 0])
    # Spans of one token each: the mass of such a document is the attention to its token.
    token_spans = torch.stack([tokens, tokens + 1], -1)[None].to(prefix.spans.device)
    mass = _mass(reader, texts, prefix, token_spans)
    return filtered_sums(mass[:, :-1] - mass[:, -1:], owner, len(spans))


def filtered_sums(scores: Tensor, owner: Tensor, documents: int) -> Tensor:
    """Sum the scores of each document's tokens without those below ``mean - 2 std``.

    Args:
        scores: ``[..., T]``, calibrated score of every token.
        owner: ``[T]`` int64, the document of every token, each with at least one.
        documents: ``C``, how many documents there are.

    Returns:
        ``[..., C]``. The deviation is that of the population, so that a document of one token
        keeps it.
    """
    out = scores.new_zeros(*scores.shape[:-1], documents)
    count = torch.bincount(owner, minlength=documents)
    mean = out.index_add(-1, owner, scores) / count
    variance = out.index_add(-1, owner, (scores - mean[..., owner]) ** 2) / count
    threshold = mean - _FILTER_DEVIATIONS * variance.sqrt()
    return out.index_add(-1, owner, scores.where(scores >= threshold[..., owner], 0.0))


def qr_mass(scores: Tensor, gold: Tensor) -> Tensor:
    """Return each query's score of its gold document.

    Args:
        scores: ``[layers, B, Hq, C]`` from :func:`calibrated_mass`.
        gold: ``[B]`` int64, the gold document of each query.

    Returns:
        ``[B, layers, Hq]``.
    """
    return scores[:, torch.arange(len(gold)), :, gold]


def qr_ndcg(scores: Tensor, gold: Tensor) -> Tensor:
    """Return nDCG@10 of the ranking that each head makes of the pool, one document relevant.

    With one relevant document it is ``1 / log2(1 + rank)``, and 0 beyond rank 10. Documents with
    equal scores rank before the gold one, so that a head without a preference scores nothing.

    Args:
        scores: ``[layers, B, Hq, C]`` from :func:`calibrated_mass`.
        gold: ``[B]`` int64, the gold document of each query.

    Returns:
        ``[B, layers, Hq]``.
    """
    own = qr_mass(scores, gold)[..., None]
    rank = (scores.transpose(0, 1) >= own).sum(-1)
    return torch.where(rank <= NDCG_CUTOFF, 1.0 / torch.log2(1.0 + rank), 0.0)


def _mass(reader: Reader, texts: Sequence[str], prefix: Prefix, spans: Tensor) -> Tensor:
    """Attention of the texts' own tokens to every span: ``[layers, B, Hq, C]``."""
    ids, mask, weights = reader.query_rows(texts)
    heads = reader.model.config.get_text_config().num_attention_heads
    at_once = max(1, _MASS_ELEMENTS // (heads * ids.shape[1] * spans.shape[1]))
    return torch.cat(
        [
            reader.injection.read_mass(
                weights[i : i + at_once],
                input_ids=ids[i : i + at_once],
                attention_mask=mask[i : i + at_once],
                document_prefix=prefix,
                document_spans=spans,
            )
            for i in range(0, len(texts), at_once)
        ],
        dim=1,
    )
