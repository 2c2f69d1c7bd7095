"""Geometry of documents in a sequence of keys: the document of each key, the scored rows."""

from __future__ import annotations

import torch
from torch import Tensor


def present_documents(spans: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``[B, C]`` bool: the documents with at least one key that is not padding.

    Args:
        spans: ``[B, C, 2]`` half-open ranges of key positions.
        mask: ``[B, T]`` bool, True for a token, or None when nothing is padding.
    """
    start, end = spans.unbind(-1)
    if mask is None:
        return end > start
    tokens_before = torch.nn.functional.pad(mask.long().cumsum(-1), (1, 0))
    start, end = spans.clamp(0, mask.shape[1]).unbind(-1)  # they may be unchecked
    return tokens_before.gather(1, end) > tokens_before.gather(1, start)


def document_of_key(spans: Tensor, length: int) -> Tensor:
    """Return ``[B, T]`` int64: the document of each key, ``C`` outside all documents.

    Args:
        spans: ``[B, C, 2]`` disjoint half-open ranges of key positions.
        length: ``T``, the number of keys.
    """
    documents = spans.shape[1]
    position = torch.arange(length, device=spans.device)
    inside = (position >= spans[..., :1]) & (position < spans[..., 1:])  # [B, C, T]
    index = torch.arange(documents, device=spans.device)[None, :, None]
    return torch.where(inside, index, documents).amin(1)


def row_positions(rows: int, length: int, device: torch.device) -> Tensor:
    """Return ``[M]``: the key position of each row; the last row is at the last key."""
    return torch.arange(length - rows, length, device=device)


def near_keys(
    rows: int, length: int, window: int, positions: Tensor | None, device: torch.device
) -> Tensor:
    """Return ``[1 or B, M, T]`` bool: the keys less than ``window`` positions before each row.

    Args:
        rows: ``M``.
        length: ``T``.
        window: how many positions a row looks back, its own included.
        positions: ``[B, T]``, or None where the keys count up from 0.
    """
    if positions is None:
        positions = torch.arange(length, device=device)[None]
    # A row before the first key sees nothing, whatever its position.
    own = row_positions(rows, length, device).clamp(min=0)
    return positions[:, own, None] - positions[:, None, :] < window


def visible_keys(
    rows: int, length: int, mask: Tensor | None, causal: bool, spans: Tensor
) -> Tensor:
    """Return ``[B, M, T]`` bool: the keys that each row may attend to."""
    batch, device = spans.shape[0], spans.device
    visible = torch.ones(batch, rows, length, dtype=torch.bool, device=device)
    if causal:
        position = row_positions(rows, length, device)
        visible &= torch.arange(length, device=device) <= position[:, None]
    if mask is not None:
        visible &= mask[:, None, :]
    return visible


def scored_rows(rows: int, length: int, spans: Tensor, causal: bool) -> Tensor:
    """Return ``[B, M]`` bool: the rows after every present document.

    A row is scored in the heads that receive the scores when at least one document is present
    and all present ones end at or before the row's own position; without ``causal`` every row
    of a batch element with a present document is.

    Args:
        rows: ``M``.
        length: ``T``.
        spans: ``[B, C, 2]`` with absent documents as ``(0, 0)``.
        causal: whether attention is causal.
    """
    start, end = spans.unbind(-1)
    any_present = (end > start).any(1, keepdim=True)  # [B, 1]
    if not causal:
        return any_present.expand(-1, rows)
    last_end = end.amax(1, keepdim=True)
    return any_present & (last_end <= row_positions(rows, length, spans.device))
