"""One call as the kernels take it: heads, flags, strides, the plan, the grid of row blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from dream_kernels.problem import Problem
from dream_kernels.triton.blocks import COUNTS
from dream_kernels.triton.config import Config, bucket, candidates, choose, family, padded_head
from dream_kernels.triton.plan import plan_kernel

LOG2_E = 1.0 / math.log(2.0)
# A split shorter than this many keys costs more in partial results than it gains.
MIN_SPLIT_KEYS = 256
# Positions of a program that makes the plan, and documents it looks at together.
_PLAN_BLOCK = 128
PLAN_DOCUMENTS = 32


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
class Plan:
    """What ``plan_kernel`` writes for tiles of ``keys`` keys."""

    tiles: Tensor
    shorts: Tensor
    rest: Tensor
    segment: Tensor
    counts: Tensor
    weights: Tensor
    limit: int


@dataclass(frozen=True)
class RowGrid:
    """Programs of a kernel over rows.

    Attributes:
        shape: of the grid.
        splits: parts of the keys, 1 where row blocks alone fill the device.
        fold: whether a tile may hold rows of several batch elements.
    """

    shape: tuple[int, int, int]
    splits: int
    fold: bool


class Call:
    """One problem, reduced to what the kernels take: aligned strides, flags, heads, plans."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.device = problem.query.device
        self.batch, self.query_heads = problem.batch, problem.query_heads
        self.key_heads, self.rows = problem.key_heads, problem.rows
        self.group = self.query_heads // self.key_heads
        self.length, self.prefix_length = problem.total_length, problem.prefix_length
        self.documents = problem.documents
        self.head_dim = problem.head_dim
        self.has_prefix = problem.prefix_key is not None
        self.key, self.prefix_key = _same_last_stride(problem.key, problem.prefix_key)
        self.value, self.prefix_value = _same_last_stride(problem.value, problem.prefix_value)
        self.spans = problem.spans.contiguous()
        self.heads = _heads(problem.heads, self.key_heads, self.device)
        self.bias = problem.mode == "bias"
        self.fixed = problem.document_mass is not None
        self.document_mass = problem.document_mass if problem.document_mass is not None else 1.0
        # Never 0, so that a masked logit of -inf stays one.
        self.scale = max(abs(problem.scale) * LOG2_E, 1e-30)
        # Without padding any pointer serves: the kernels do not follow it.
        mask = self.heads.scored if problem.mask is None else problem.mask.contiguous()
        self.mask = mask.view(torch.uint8)
        self._plans: dict[tuple[int, int, bool], Plan] = {}
        self.shape_flags = {
            "D": self.head_dim,
            "BD": padded_head(self.head_dim),
            "CAUSAL": problem.causal,
            "HAS_MASK": problem.mask is not None,
            "NEGATE": problem.scale < 0,
            "IP": _products(problem.query.dtype, self.device),
        }
        self.mode_flags = {
            "PER_HEAD": problem.scores.shape[1] > 1,
            "BIAS": self.bias,
        }

    def plan(self, config: Config, segment: bool = False) -> Plan:
        key = (config.keys, config.slot, segment)
        if key not in self._plans:
            self._plans[key] = self._make_plan(*key)
        return self._plans[key]

    def any_plan(self) -> Plan:
        """A plan for tiles of some size: weights and scored rows are the same in all plans."""
        if not self._plans:
            self.plan(self.configs("query", self.reach)[0])
        return next(iter(self._plans.values()))

    def _make_plan(self, keys: int, slot: int, segment: bool) -> Plan:
        problem, batch, length, documents = self.problem, self.batch, self.length, self.documents
        # Every tile but a document's last is full, and one document, short or not, may be cut at
        # the prefix's end.
        limit = length // keys + min(documents, length // (slot + 1)) + 2
        sizes = (
            batch * limit * 4, batch * documents * 4, batch * length,
            batch * length if segment else 0, batch * COUNTS.value,
        )  # fmt: skip
        # Each part begins at 16 bytes, whatever the sizes: a kernel is compiled for alignments.
        sizes = tuple(triton.cdiv(size, 4) * 4 for size in sizes)
        buffer = torch.empty(sum(sizes), dtype=torch.int32, device=self.device)
        tiles, shorts, rest, segments, counts = buffer.split(sizes)
        score_heads = problem.scores.shape[1]
        weights = torch.empty(
            batch, score_heads, documents, dtype=torch.float32, device=self.device
        )
        plan = Plan(tiles, shorts, rest, segments, counts, weights, limit)
        blocks = triton.cdiv(max(limit, length), _PLAN_BLOCK)
        plan_kernel[(blocks + score_heads, batch)](
            self.spans, self.mask, problem.scores, plan.tiles, plan.shorts, plan.rest, plan.segment,
            plan.counts, weights, *problem.scores.stride(), self.rows, length, self.prefix_length,
            documents, limit, blocks, BN=keys, SLOT=slot, BX=_PLAN_BLOCK, BC=PLAN_DOCUMENTS,
            BW=min(1024, max(16, bucket(documents))), HS=score_heads, CAUSAL=problem.causal,
            BIAS=self.bias, SEGMENT=segment, HAS_MASK=problem.mask is not None, num_warps=4,
        )  # fmt: skip
        return plan

    def memory(self) -> tuple[list[Tensor], list[int]]:
        """Pointers and strides of keys and values; the local ones stand in for no prefix."""
        prefix_key = self.key if self.prefix_key is None else self.prefix_key
        prefix_value = self.value if self.prefix_value is None else self.prefix_value
        strides = [*self.key.stride(), *self.value.stride()]
        for tensor in (prefix_key, prefix_value):
            batch, head, key, _ = tensor.stride()
            strides += [batch if tensor.shape[0] > 1 else 0, head, key]
        return [self.key, self.value, prefix_key, prefix_value], strides

    def row_tensor(self, *leading: int, slots: int) -> Tensor:
        shape = (*leading, self.batch, self.query_heads, slots, self.rows)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def configs(self, kernel: str, rows: int) -> tuple[Config, ...]:
        return candidates(
            kernel, self.head_dim, self.problem.query.dtype, rows, _family(self.device)
        )

    def tuned(
        self, kernel: str, rows: int, launch: Callable[[Config], object], *flags: Hashable
    ) -> Config:
        """The configuration for a kernel at this call's sizes."""
        problem = self.problem
        configs = self.configs(kernel, rows)
        key = (
            kernel, self.head_dim, problem.query.dtype, self.has_prefix, *flags,
            *self.shape_flags.values(), *self.mode_flags.values(),
            bucket(rows), bucket(self.batch * self.key_heads), bucket(self.length),
            bucket(self.length // self.documents),
        )  # fmt: skip
        return choose(key, configs, launch, self.device)

    def kind(self, kernel: str) -> str:
        """The name of a kernel over rows among the tile shapes: folded or split it has others."""
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
        shared = self.prefix_key is not None and self.prefix_key.shape[0] < self.batch
        long = self.prefix_length >= 2 * (self.length - self.prefix_length)
        return self.group * self.rows * (self.batch if shared and long else 1)

    def grid(self, config: Config) -> RowGrid:
        """How the rows are cut into blocks, and their keys split."""
        rows = self.group * self.rows
        blocks, elements, fold = triton.cdiv(rows, config.rows), self.batch, False
        folded = triton.cdiv(self.reach, config.rows)
        # A folded tile is not split: where that few rows are left, the elements' own tiles are
        # split instead, and read the shared prefix at about the same time, from the cache.
        if self.reach > rows and folded < blocks * elements and self._splits(folded) == 1:
            blocks, elements, fold = folded, 1, True
        splits = self._splits(blocks * elements)
        return RowGrid((blocks * splits, self.key_heads, elements), splits, fold)

    def _splits(self, blocks: int) -> int:
        wanted = 2 * _processors(self.device) // (blocks * self.key_heads)
        return max(1, min(wanted, self.length // MIN_SPLIT_KEYS))


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _family(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return family(0)
    return family(torch.cuda.get_device_capability(device)[0])


def _products(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 is multiplied: exactly, unless PyTorch's own switch allows TF32."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Where there is a newer switch, the old one cannot be read once the newer one was set.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def _same_last_stride(local: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kernels take one stride for the elements of a key, local or not."""
    if prefix is None or prefix.stride(-1) == local.stride(-1):
        return local, prefix
    return local.contiguous(), prefix if prefix.stride(-1) == 1 else prefix.contiguous()
