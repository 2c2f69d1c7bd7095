"""One call as the kernels take it: their arguments by name, work lists, the grid of row blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from dream_kernels.problem import Problem
from dream_kernels.triton import device
from dream_kernels.triton.plan import Plan, run
from dream_kernels.triton.tiles import Config, family_of, padded_head
from dream_kernels.triton.tuning import bucket, candidates, choose
from dream_kernels.triton.work_list import weights_kernel

LOG2_E = 1.0 / math.log(2.0)
# A split shorter than this many keys costs more in partial results than it gains.
MIN_SPLIT_KEYS = 256
# Positions less a window are int64.
_LONGEST_WINDOW = 1 << 62
# Documents that a program reads together.
DOCUMENT_BLOCK = 32
# Arguments that are None unless a call has that option.
OPTIONS = ("window", "positions", "cap", "sinks")


def strides(of: str, dimensions: str, tensor: Tensor) -> dict[str, int]:
    """Strides as the kernels name them: ``s_qb`` for dimension ``b`` of ``q``."""
    return dict(zip(_stride_names(of, dimensions), tensor.stride()))


@cache
def _stride_names(of: str, dimensions: str) -> tuple[str, ...]:
    return tuple(f"s_{of}{dimension}" for dimension in dimensions)


def tile_arguments(config: Config) -> dict[str, int]:
    return {"BM": config.rows, "BN": config.keys, "SLOT": config.slot}


@dataclass(frozen=True)
class Heads:
    """Which heads receive the scores, on the device.

    Attributes:
        order: ``[Hq]`` int32: the query heads of each key head, scored ones first.
        count: ``[Hkv]`` int32: how many of them are scored.
        scored: ``[Hq]`` int32: 1 for a scored head.
        any: whether any head is.
    """

    order: Tensor
    count: Tensor
    scored: Tensor
    any: bool


@lru_cache(maxsize=1024)
def _heads(scored: tuple[bool, ...], key_heads: int, device: torch.device) -> Heads:
    group = len(scored) // key_heads
    order = sorted(range(len(scored)), key=lambda h: (h // group, not scored[h]))
    count = [sum(scored[h * group : (h + 1) * group]) for h in range(key_heads)]
    flat = torch.tensor([*order, *count, *map(int, scored)], dtype=torch.int32, device=device)
    in_order, counts, flags = flat.split([len(scored), key_heads, len(scored)])
    return Heads(in_order, counts, flags, any(scored))


@dataclass(frozen=True)
class RowGrid:
    """Programs of a kernel over rows.

    Attributes:
        shape: of the grid.
        splits: parts of the keys, 1 if row blocks alone fill the device.
        fold: whether a tile may hold rows of several batch elements.
    """

    shape: tuple[int, int, int]
    splits: int
    fold: bool

    @property
    def arguments(self) -> dict[str, Any]:
        return {"S": self.splits, "FOLD": self.fold, "SPLIT": self.splits > 1}


class Call:
    """One problem, reduced to what the kernels take.

    Attributes:
        arguments: what depends on the problem alone, by the names of the kernels' parameters.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.device = problem.query.device
        self.batch, self.query_heads = problem.batch, problem.query_heads
        self.key_heads, self.rows = problem.key_heads, problem.rows
        self.group = self.query_heads // self.key_heads
        self.length, self.prefix_length = problem.total_length, problem.prefix_length
        self.documents = problem.documents
        self.head_dim = problem.head_dim
        self.heads = _heads(problem.heads, self.key_heads, self.device)
        self.bias = problem.mode == "bias"
        self.fixed = problem.document_mass is not None
        self.plan = Plan.of(problem)
        self._flags = {
            "D": self.head_dim,
            "BD": padded_head(self.head_dim),
            "CAUSAL": problem.causal,
            "HAS_PREFIX": problem.prefix_key is not None,
            "HAS_MASK": problem.mask is not None,
            "NEGATE": problem.scale < 0,
            "IP": device.product_precision(problem.query.dtype, self.device),
            "PER_HEAD": problem.scores.shape[1] > 1,
            "BIAS": self.bias,
        }
        # Without padding any pointer serves: the kernels do not read from it.
        mask = self.heads.scored if problem.mask is None else problem.mask.contiguous()
        self.arguments = {
            "q": problem.query, **strides("q", "bhmd", problem.query), **self._memory(),
            "mask": mask.view(torch.uint8), "spans": problem.spans.contiguous(),
            "table": self.heads.order, "n_scored": self.heads.count, "scored": self.heads.scored,
            "B": self.batch, "Hq": self.query_heads, "G": self.group, "M": self.rows,
            "T": self.length, "P": self.prefix_length, "C": self.documents,
            "document_mass": 1.0 if problem.document_mass is None else problem.document_mass,
            **self._options(), **self._flags, "FIXED": self.fixed,
        }  # fmt: skip

    def _options(self) -> dict[str, Any]:
        """What a call may add to attention, None where it does not: nothing is compiled for it."""
        problem, window = self.problem, self.problem.window
        if window is not None and problem.positions is None and window >= self.length:
            window = None  # it reaches all keys
        scale, cap = abs(problem.scale), None
        if problem.softcap is not None:
            scale, cap = problem.softcap, scale / problem.softcap
        return {
            # Never 0, so that a masked logit of -inf stays -inf.
            "scale": max(scale * LOG2_E, 1e-30), "cap": cap,
            "window": None if window is None else min(window, _LONGEST_WINDOW),
            "positions": None if problem.positions is None else problem.positions.contiguous(),
            "sinks": None if problem.sinks is None else problem.sinks.contiguous(),
        }  # fmt: skip

    def _memory(self) -> dict[str, Any]:
        """Keys and values; without a prefix the local ones are passed in its place."""
        problem = self.problem
        arguments: dict[str, Any] = {}
        for name, local, prefix in (
            ("k", problem.key, problem.prefix_key), ("v", problem.value, problem.prefix_value),
        ):  # fmt: skip
            local, prefix = _same_last_stride(local, prefix)
            prefix = local if prefix is None else prefix
            of_prefix = strides(f"p{name}", "bhn", prefix)
            if prefix.shape[0] == 1:
                of_prefix[f"s_p{name}b"] = 0
            arguments |= {name: local, f"p{name}": prefix}
            arguments |= {**strides(name, "bhnd", local), **of_prefix}
        return arguments

    def work_list(self, config: Config) -> dict[str, Any]:
        """The arguments of the kernels that visit documents, for tiles of a shape."""
        made = self.plan.documents_in_tiles(config.keys, config.slot)
        return {
            "tiles": made.tiles, "shorts": made.shorts, "rest": self.plan.rest,
            "counts": made.counts, "NT": made.limit, "weights": self.weights(),
        }  # fmt: skip

    def weighed_rows(self) -> dict[str, Any]:
        """The arguments of kernels that visit no documents: which rows are scored, and weights."""
        config = self.configs("query", self.reach)[0]
        made = self.plan.documents_in_any_tiles(config.keys, config.slot)
        return {"counts": made.counts, "weights": self.weights()}

    def weights(self) -> Tensor:
        """``[B, 1 or Hq, C]`` float32: what ``weights_kernel`` makes of the scores."""
        scores = self.problem.scores.detach()
        return self.problem.reading.keep(
            ("weights", self.bias), (scores, self.problem.spans), lambda: self._weigh(scores)
        )

    def _weigh(self, scores: Tensor) -> Tensor:
        weights = torch.empty(scores.shape, dtype=torch.float32, device=self.device)
        arguments = {
            **self.arguments, "scores": scores, **strides("s", "bhc", scores), "weights": weights,
            "HS": scores.shape[1], "BW": min(1024, max(16, bucket(self.documents))),
        }  # fmt: skip
        run(weights_kernel, (scores.shape[1] * self.batch,), arguments, num_warps=4)
        return weights

    def row_tensor(self, *leading: int, slots: int) -> Tensor:
        shape = (*leading, self.batch, self.query_heads, slots, self.rows)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def configs(self, kernel: str, rows: int) -> tuple[Config, ...]:
        family = family_of(device.capability(self.device))
        return candidates(kernel, self.head_dim, self.problem.query.dtype, rows, family)

    def tuned(
        self, kernel: str, rows: int, launch: Callable[[Config], object], *flags: Hashable
    ) -> Config:
        """The configuration for a kernel at this call's sizes."""
        configs = self.configs(kernel, rows)
        key = (
            kernel, self.problem.query.dtype, *flags, *self._flags.values(),
            *(self.arguments[name] is None for name in OPTIONS), bucket(rows),
            bucket(self.batch * self.key_heads), bucket(self.length),
            bucket(self.length // self.documents),
        )  # fmt: skip
        return choose(key, configs, launch, self.device)

    def kind(self, kernel: str) -> str:
        """The name of a kernel over rows in the table of tile shapes: with folding or splitting."""
        grid = self.grid(self.configs(kernel, self.reach)[0])
        if grid.splits > 1:
            return f"{kernel}-split"
        return f"{kernel}-fold" if grid.fold else kernel

    @property
    def reach(self) -> int:
        """Rows of a key head that may share a tile: those of the batch where the prefix is shared.

        Folded tiles visit the local keys once per batch element, for all their rows: the prefix
        has to be the larger part.
        """
        prefix = self.problem.prefix_key
        shared = prefix is not None and prefix.shape[0] < self.batch
        long = self.prefix_length >= 2 * (self.length - self.prefix_length)
        return self.group * self.rows * (self.batch if shared and long else 1)

    def grid(self, config: Config) -> RowGrid:
        """How the rows are cut into blocks, and their keys split."""
        rows = self.group * self.rows
        blocks, elements, fold = triton.cdiv(rows, config.rows), self.batch, False
        folded = triton.cdiv(self.reach, config.rows)
        # A folded tile is not split: with so few rows, the elements' own tiles are
        # split instead, and read the shared prefix at about the same time, from the cache.
        if self.reach > rows and folded < blocks * elements and self._splits(folded) == 1:
            blocks, elements, fold = folded, 1, True
        splits = self._splits(blocks * elements)
        return RowGrid((blocks * splits, self.key_heads, elements), splits, fold)

    def _splits(self, blocks: int) -> int:
        wanted = 2 * device.processors(self.device) // (blocks * self.key_heads)
        return max(1, min(wanted, self.length // MIN_SPLIT_KEYS))


def _same_last_stride(local: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Copy keys or values as needed: the kernels take one last stride for local ones and prefix."""
    if prefix is None or prefix.stride(-1) == local.stride(-1):
        return local, prefix
    return local.contiguous(), prefix if prefix.stride(-1) == 1 else prefix.contiguous()
