"""Sliding windows: which keys a layer's window cuts off, and whether documents are among them."""

from __future__ import annotations

import torch
from torch import Tensor

from dream_kernels.argument_checks import is_traced
from dream_kernels.injection.context import DocumentContext


class WindowError(ValueError):
    """A sliding window of the model is too short for rows with scores to see all documents."""


def effective_window(context: DocumentContext, window: int | None) -> int | None:
    """Return the window of a layer, None if it holds every key of the pass."""
    if window is None or context.positions_given:
        return window
    prefix = context.prefix
    before = 0 if prefix is None else prefix.extent
    return None if before is not None and before + context.length <= window else window


def check_window(context: DocumentContext, layer: int, window: int, rows: int) -> None:
    """Raise :class:`WindowError` if a scored row of a layer would not see a whole document."""
    needed = _needed(context, rows)
    if needed > window:
        raise WindowError(
            f"layer {layer} attends through a sliding window of {window} tokens, and row "
            f"{rows - 1} is {needed - 1} tokens after the start of a document, which the scores "
            "need in full: read the documents independently, read shorter ones, or choose heads "
            "in layers without such a window"
        )


def _needed(context: DocumentContext, rows: int) -> int:
    """The least window in which every scored row sees the documents in full.

    Read from what the host knows of the prefix, an upper bound where suffixes are padded. Other
    documents are read from their tensors, once in a pass; in a graph only the operator can, when it
    runs.
    """
    if context.needed_window is None:
        prefix = context.prefix
        if prefix is not None and context.own_spans and not context.positions_given:
            context.needed_window = prefix.farthest() + context.length
        else:
            context.needed_window = _read_needed(context, rows)
    return context.needed_window


def _read_needed(context: DocumentContext, rows: int) -> int:
    assert context.spans is not None
    if is_traced(context.spans):
        return 0
    spans = context.spans.cpu()
    start, end = spans.unbind(-1)
    batch, length = len(spans), context.total
    positions = torch.arange(length).expand(batch, -1)
    if context.positions is not None:
        positions = context.positions.cpu().expand(batch, -1)
    present = end > start
    scored = present.any(1) & (end.amax(1) < length)
    first = positions.gather(1, start.clamp(0, length - 1)).masked_fill(~present, 1 << 60)
    distance = positions[:, length - rows :].amax(1) - first.amin(1)
    return int(distance.masked_fill(~scored, -1).max()) + 1


def places_of(documents: list[list[int]], header: int) -> Tensor | None:
    """Positions ``[rows, P]`` of the tokens of documents that were read alone.

    None where they count up: a row holds no more than one document.

    Args:
        documents: for each row the lengths of its documents, which follow the header.
        header: tokens before every document.
    """
    if all(len(lengths) <= 1 for lengths in documents):
        return None
    width = header + max(map(sum, documents))
    positions = torch.zeros(len(documents), width, dtype=torch.long)
    for row, lengths in zip(positions, documents, strict=True):
        counted = torch.cat([torch.arange(header), *(header + torch.arange(n) for n in lengths)])
        row[: len(counted)] = counted
    return positions
