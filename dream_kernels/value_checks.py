"""The checks that read the contents of tensors."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from dream_kernels.problem import Problem
from dream_kernels.spans import row_positions

_value_checks: bool | None = None


def set_value_checks(enabled: bool | None) -> None:
    """Turn the checks that read the *contents* of tensors on or off.

    They detect overlapping or out-of-range spans and NaN scores. By default they run where reading
    is free, for tensors on the CPU, and not on an accelerator, where they would synchronise with
    the device. The environment variable ``DREAM_KERNELS_CHECK`` (``0`` or ``1``) sets the default.

    Args:
        enabled: True to check always, False never, None for the default.
    """
    global _value_checks
    _value_checks = enabled


def checks_values_of(tensor: Tensor) -> bool:
    if _value_checks is not None:
        return _value_checks
    environment = os.environ.get("DREAM_KERNELS_CHECK")
    if environment in ("0", "1"):
        return environment == "1"
    return tensor.device.type == "cpu"


def check_logits(scores: Tensor, sinks: Tensor | None) -> None:
    """Raise ``ValueError`` for impossible scores and sinks, where contents are checked."""
    if checks_values_of(scores):
        _check_logits("scores", scores.detach())
        if sinks is not None:
            _check_logits("sinks", sinks.detach())


def check_problem_values(problem: Problem) -> None:
    """Raise ``ValueError`` for impossible contents of a problem, where contents are checked."""
    if checks_values_of(problem.spans):
        check_span_values(problem.spans, problem.total_length)
    check_logits(problem.scores, problem.sinks)
    if not problem.empty:
        check_window(problem)


def check_span_values(spans: Tensor, length: int) -> None:
    """Raise ``ValueError`` unless the spans ``[B, C, 2]`` are in range and disjoint."""
    if _ascend(spans, length):
        return
    start, end = spans.unbind(-1)
    bad = (start < 0) | (end < start) | (end > length)
    if bad.any():
        b, c = bad.nonzero()[0].tolist()
        raise ValueError(
            f"spans must satisfy 0 <= start <= end <= {length} (prefix and local keys), "
            f"got spans[{b}, {c}] = {spans[b, c].tolist()}"
        )
    # Absent documents may be anywhere, so they sort after all others.
    order = torch.where(end > start, start, length).argsort(dim=1, stable=True)
    start, end = start.gather(1, order), end.gather(1, order)
    both_present = (end > start)[:, 1:] & (end > start)[:, :-1]
    overlap = both_present & (start[:, 1:] < end[:, :-1])
    if overlap.any():
        b, i = overlap.nonzero()[0].tolist()
        first, second = order[b, i : i + 2].tolist()
        raise ValueError(
            f"spans must be disjoint, got spans[{b}, {first}] = {spans[b, first].tolist()} and "
            f"spans[{b}, {second}] = {spans[b, second].tolist()}"
        )


def _ascend(spans: Tensor, length: int) -> bool:
    """Whether each document begins where the one before it ends, or after it: the usual case.

    A list tells so in a tenth of the time that the operations on small tensors take.
    """
    for edges in spans.flatten(1).tolist():
        if edges[0] < 0 or edges[-1] > length or edges != sorted(edges):
            return False
    return True


def check_window(problem: Problem) -> None:
    """Raise ``ValueError`` where the window is too short for the documents of a scored row."""
    window = problem.window
    if window is None or not any(problem.heads) or not checks_values_of(problem.spans):
        return
    length = problem.total_length
    positions = problem.positions
    if positions is None:
        positions = torch.arange(length, device=problem.spans.device)
    positions = positions.expand(problem.batch, -1)
    start, end = problem.spans.unbind(-1)
    # How many documents are open at each key: 0 or 1.
    change = torch.zeros(problem.batch, length + 1, dtype=torch.long, device=start.device)
    change.scatter_add_(1, start, torch.ones_like(start)).scatter_add_(
        1, end, -torch.ones_like(end)
    )
    of_document = change.cumsum(1)[:, :-1] > 0
    if problem.mask is not None:
        of_document &= problem.mask
    rows = row_positions(problem.rows, length, start.device)
    scored = of_document.any(1, keepdim=True) & (rows >= end.amax(1, keepdim=True))
    own = positions[:, rows.clamp(min=0)].masked_fill(~scored, torch.iinfo(torch.long).min)
    farthest = positions.masked_fill(~of_document, torch.iinfo(torch.long).max)
    last, first = own.amax(1), farthest.amin(1)
    bad = scored.any(1) & (last - first >= window)
    if bad.any():
        b = int(bad.nonzero()[0])
        key, row = int(farthest[b].argmin()), int(own[b].argmax())
        document = int(((start[b] <= key) & (key < end[b])).nonzero()[0])
        raise ValueError(
            f"window must reach from every scored row to the start of every document, got window "
            f"{window}: in batch element {b} row {row}, at position {int(last[b])}, is "
            f"{int(last[b] - first[b])} positions after key {key} of document {document}"
        )


def _check_logits(name: str, logits: Tensor) -> None:
    if not logits.numel() or logits.max().item() < math.inf:
        return
    bad = (~(logits < torch.inf)).nonzero()[0].tolist()
    raise ValueError(f"{name} must not be NaN or +inf, got {logits[tuple(bad)].item()} at {bad}")
