"""Reading documents once, without gradient, into a :class:`Prefix`.

The hidden states of the documents do not depend on the scores, because only rows after the
documents are scored. So their keys and values are computed once and every suffix attends to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels.injection import support
from dream_kernels.injection.context import Prefix
from dream_kernels.validation import check_span_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def read_jointly(
    model: PreTrainedModel,
    input_ids: Tensor,
    spans: Tensor,
    attention_mask: Tensor | None = None,
) -> Prefix:
    """Read documents that stand in one sequence, each seeing those before it.

    Args:
        model: the reader, injected or not.
        input_ids: ``[1, P]`` for a pool that all suffixes share, ``[B, P]`` for one pool each.
        spans: ``[1 or B, C, 2]``, where the documents stand in ``input_ids``.
        attention_mask: ``[1 or B, P]``, 0 for padding at the end of a row, or None.

    Returns:
        The prefix; a suffix goes on at the position after the last token.

    Raises:
        ValueError: padding stands before a token, the spans do not fit, or a sliding window of
            the model is shorter than the sequence.
    """
    check_span_values(spans, input_ids.shape[1])
    mask = None
    next_position = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    if attention_mask is not None and not attention_mask.all():
        mask = attention_mask.bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("attention_mask of a prefix must have its padding at the end")
        next_position = mask.sum(1)
    layers = _keys_and_values(model, input_ids, mask)
    return Prefix(layers, spans.long(), next_position, mask)


@torch.no_grad()
def read_independently(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    pools: Sequence[Sequence[int]] | None = None,
    header: Sequence[int] = (),
    batch_size: int = 32,
) -> Prefix:
    """Read every document alone, all at the same positions.

    Each document sees ``header`` and itself. The header's keys and values come out the same for
    all documents, so the prefix holds them once, outside the spans.

    Args:
        model: the reader, injected or not.
        documents: token ids of each document, at least one each.
        pools: for each suffix the indices of its documents; None for one pool of all documents
            that every suffix shares.
        header: token ids that stand before every document, such as the beginning-of-sequence
            token that readers use as an attention sink.
        batch_size: how many documents are read in one forward pass.

    Returns:
        The prefix; a suffix goes on at the position after the longest document of its pool.

    Raises:
        ValueError: there are no documents, one is empty, or a pool names one that is not there.
    """
    lengths = [len(document) for document in documents]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"documents must hold at least one token each, got lengths {lengths}")
    rows = [list(range(len(documents)))] if pools is None else [list(pool) for pool in pools]
    if any(not pool for pool in rows):
        raise ValueError("pools must name at least one document each")
    if any(not 0 <= i < len(documents) for pool in rows for i in pool):
        raise ValueError(f"pools must name documents 0 .. {len(documents) - 1}, got {rows}")
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    width = len(header) + max(lengths)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros(len(documents), width, dtype=torch.bool)
    for i, document in enumerate(documents):
        tokens = [*header, *document]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = True
    parts = [
        _keys_and_values(model, ids[i : i + batch_size].to(device), mask[i : i + batch_size])
        for i in range(0, len(documents), batch_size)
    ]

    # Where each key of the prefix comes from in the flattened [documents * width] grid.
    sources, spans = [], torch.zeros(len(rows), max(map(len, rows)), 2, dtype=torch.long)
    for b, pool in enumerate(rows):
        source = list(range(pool[0] * width, pool[0] * width + len(header)))
        for c, i in enumerate(pool):
            begin = i * width + len(header)
            spans[b, c, 0] = len(source)
            source += range(begin, begin + lengths[i])
            spans[b, c, 1] = len(source)
        sources.append(source)
    longest = max(map(len, sources))
    index = torch.tensor([s + [0] * (longest - len(s)) for s in sources], device=device)
    prefix_mask = None
    if any(len(s) < longest for s in sources):
        counts = torch.tensor([len(s) for s in sources], device=device)
        prefix_mask = torch.arange(longest, device=device) < counts[:, None]
    layers = []
    for layer in range(len(parts[0])):
        key = torch.cat([part[layer][0] for part in parts])
        value = torch.cat([part[layer][1] for part in parts])
        layers.append((_pick(key, index), _pick(value, index)))
        for part in parts:  # the grid of a layer is not needed once its prefix stands
            part[layer] = (key[:0], value[:0])
    next_position = torch.tensor(
        [len(header) + max(lengths[i] for i in pool) for pool in rows], device=device
    )
    return Prefix(layers, spans.to(device), next_position, prefix_mask)


def _pick(states: Tensor, index: Tensor) -> Tensor:
    """Keys or values ``[documents, Hkv, L, D]`` at flat ``index [B, P]``: ``[B, Hkv, P, D]``."""
    return states.transpose(1, 2).flatten(0, 1)[index].transpose(1, 2)


def _keys_and_values(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Run the decoder without its language-model head and return every layer's cache."""
    from transformers import DynamicCache

    cache, decoder = DynamicCache(), model.base_model
    decoder(
        input_ids=input_ids,
        attention_mask=None if mask is None else mask.long().to(input_ids.device),
        use_cache=True,
        **{support.cache_keyword(decoder): cache},
    )
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
