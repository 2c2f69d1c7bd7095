"""Rows of all processes in one tensor, with or without the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dream_training.distributed import world


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Join the rows of all processes, in their order.

    The gradient of a row is the sum of its gradients over the processes. If the trainer then
    averages the parameters' gradients over ``W`` processes, as DDP and FSDP do, it minimises the
    *mean* of the processes' losses.

    Args:
        rows: ``[N_r, ...]`` of this process, any ``N_r`` and equal other sizes.
        counts: ``N_r`` of every process.

    Returns:
        ``[sum N_r, ...]``, the same in all processes.

    Raises:
        ValueError: ``counts`` does not fit the number of processes or ``rows``.
    """
    if len(counts) != world.size() or counts[world.rank()] != len(rows):
        raise ValueError(
            f"counts must hold the rows of each of {world.size()} processes, {len(rows)} of this "
            f"one, got {list(counts)}"
        )
    if len(counts) == 1:
        return rows
    return _GatherRows.apply(rows, list(counts))


def replicated(parameter: Tensor) -> Tensor:
    """A parameter that every process holds and that no engine keeps in sync.

    Its gradient is the mean over the processes, as with DDP, so the copies stay equal.
    """
    return parameter if world.size() == 1 else _Replicated.apply(parameter)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        # A copy: the gradient may be used elsewhere, and the sum is in place.
        gradient = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[world.rank()], None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        gradient = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient / world.size()
