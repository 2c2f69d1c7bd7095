"""The documents of a pool read by several processes, each its share, and joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dream_kernels import Prefix
from dream_training.distributed import world
from dream_training.distributed.gather import gather_rows
from dream_training.distributed.pool import SHARE, Share
from dream_training.reading.reader import Reader


def read_pool(reader: Reader, pool: dict[str, Any]) -> Prefix:
    """Read the documents of a pool, each in one process, for suffixes that share all of them.

    Documents that are read jointly depend on those before them: then each process reads all.
    """
    texts, share = pool["texts"], pool.get(SHARE)
    if share is None or reader.context == "joint":
        return reader.read(texts)
    return join_pools(reader.read([texts[i] for i in share.rows] or texts[:1]), share)


def read_each(reader: Reader, pool: dict[str, Any]) -> Prefix:
    """Read every document of a pool into a prefix of its own row, each in one process."""
    texts, share = pool["texts"], pool.get(SHARE)
    if share is not None:
        texts = [texts[i] for i in share.rows] or texts[:1]
    prefix = reader.read(texts, [[i] for i in range(len(texts))])
    return prefix if share is None else join_rows(prefix, share)


def tokens_read(prefix: Prefix, reader: Reader, pool: dict[str, Any]) -> int:
    """Tokens that this process has read for a prefix of the pool."""
    share = pool.get(SHARE)
    if share is None or reader.context == "joint":
        return prefix.tokens
    return int(prefix.spans[0, list(share.rows)].diff(dim=-1).sum())


def join_pools(prefix: Prefix, share: Share) -> Prefix:
    """Join prefixes of one row, each the header and a share of the documents without gaps.

    The header is the same in all processes and is kept once. Nothing has a gradient.
    """
    spans = prefix.spans[0, : len(share.rows)]  # [C_r, 2]
    header = int(prefix.spans[0, 0, 0])
    end = int(spans[-1, 1]) if len(spans) else header
    tokens = [found[0] for found in world.gather_json([end - header])]
    lengths = share.gather(spans.diff(dim=-1))  # [C, 1]
    ends = header + lengths.cumsum(0)

    def join(states: Tensor) -> Tensor:  # [1, Hkv, P_r, D]
        own = states[0, :, header:end].transpose(0, 1)  # [P_r, Hkv, D]
        joined = gather_rows(own, tokens).transpose(0, 1)
        return torch.cat([states[0, :, :header], joined], dim=1)[None]

    with torch.no_grad():
        layers = [(join(key), join(value)) for key, value in prefix.layers]
    starts = ends - lengths
    before = (starts - header).flatten().repeat_interleave(lengths.flatten())
    device = before.device
    alone = header + torch.arange(len(before), device=device) - before
    return Prefix(
        layers,
        torch.cat([starts, ends], dim=-1)[None],
        (header + lengths.max()).reshape(1),
        positions=torch.cat([torch.arange(header, device=device), alone])[None],
    )


def join_rows(prefix: Prefix, share: Share) -> Prefix:
    """Join prefixes whose rows are one document each. Nothing has a gradient."""
    width = max(world.gather_json(prefix.length))
    mask = prefix.mask
    if mask is None:
        mask = prefix.spans.new_ones(prefix.batch, prefix.length, dtype=torch.bool)
    mask = share.gather(_widened(mask.long(), width, 1)).bool()

    def join(states: Tensor) -> Tensor:
        return share.gather(_widened(states, width, 2))

    with torch.no_grad():
        layers = [(join(key), join(value)) for key, value in prefix.layers]
    return replace(
        prefix,
        layers=layers,
        spans=share.gather(prefix.spans),
        next_position=share.gather(prefix.next_position),
        mask=None if bool(mask.all()) else mask,
    )


def _widened(states: Tensor, width: int, dim: int) -> Tensor:
    shape = list(states.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([states, states.new_zeros(shape)], dim=dim)
