"""One call as the kernels take it: their arguments by name, work lists, the grid of row blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from dream_kernels.problem import Kept, Problem
from dream_kernels.triton import device
from dream_kernels.triton.plan import Plan, cdiv
from dream_kernels.triton.tiles import Config, family_of, in_one_pass, padded_head
from dream_kernels.triton.tuning import bucket, candidates, choose

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


def unit(step: int, itemsize: int) -> int:
    """The elements in 16 bytes, if strides are multiples of so many and of 16 are not all; else 1.

    Args:
        step: a common divisor of the strides.
    """
    elements = 16 // itemsize
    return elements if step % 16 and step % elements == 0 else 1


@cache
def tile_arguments(config: Config) -> dict[str, int]:
    return {"BM": config.rows, "BN": config.keys, "SLOT": config.slot}


@dataclass(frozen=True)
class Heads:
    """Which heads receive the scores, on the device.

    Attributes:
        order: ``[Hq]`` int32: the query heads of each key head, scored ones first.
        count: ``[Hkv]`` int32: how many of them are scored.
        scored: ``[Hq]`` int32: 1 for a scored head.
    """

    order: Tensor
    count: Tensor
    scored: Tensor


@lru_cache(maxsize=1024)
def _heads(scored: tuple[bool, ...], key_heads: int, on: torch.device) -> Heads:
    return _make_heads(scored, key_heads, on, capturing=False)


def _make_heads(
    scored: tuple[bool, ...], key_heads: int, on: torch.device, capturing: bool
) -> Heads:
    group = len(scored) // key_heads
    order = sorted(range(len(scored)), key=lambda h: (h // group, not scored[h]))
    count = [sum(scored[h * group : (h + 1) * group]) for h in range(key_heads)]
    values = [*order, *count, *map(int, scored)]
    if capturing:
        # The host's memory cannot be copied then: the values are arguments of kernels.
        flat = torch.zeros(len(values), dtype=torch.int32, device=on)
        torch._foreach_add_(list(flat.unbind()), values)
    else:
        flat = torch.tensor(values, dtype=torch.int32, device=on)
    in_order, counts, flags = flat.split([len(scored), key_heads, len(scored)])
    return Heads(in_order, counts, flags)


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

    @cached_property
    def arguments(self) -> dict[str, Any]:
        return {"S": self.splits, "FOLD": self.fold, "SPLIT": self.splits > 1}


class _Form:
    """What the calls of the same shapes, strides, dtypes and options have in common.

    Attributes:
        numbers: arguments of the kernels that are no tensors, by the names of their parameters.
        any_head: whether any head receives the scores.
        reach: rows of a key head that may share a tile.
    """

    def __init__(self, problem: Problem) -> None:
        self.device, self.dtype = problem.query.device, problem.query.dtype
        self.batch, self.query_heads = problem.batch, problem.query_heads
        self.key_heads, self.rows = problem.key_heads, problem.rows
        self.group = self.query_heads // self.key_heads
        self.length, self.prefix_length = problem.total_length, problem.prefix_length
        self.documents, self.head_dim = problem.documents, problem.head_dim
        self.bias, self.fixed = problem.mode == "bias", problem.document_mass is not None
        # Rows of a key head that may share a tile: those of the batch where the prefix is shared.
        # Folded tiles visit the local keys once per batch element, for all their rows: the prefix
        # has to be the larger part.
        shared = problem.prefix_key is not None and problem.prefix_key.shape[0] < self.batch
        long = self.prefix_length >= 2 * (self.length - self.prefix_length)
        self.reach = self.group * self.rows * (self.batch if shared and long else 1)
        self.any_head = any(problem.heads)
        memory = strides("q", "bhmd", problem.query) | _strides_of_memory(problem)
        # The greatest common divisor of all strides between rows.
        self._step = math.gcd(*(memory[name] for name in memory if name[-1] != "d"))
        self._flags = {
            "D": self.head_dim,
            "BD": padded_head(self.head_dim),
            "CAUSAL": problem.causal,
            "HAS_PREFIX": problem.prefix_key is not None,
            "HAS_MASK": problem.mask is not None,
            "NEGATE": problem.scale < 0,
            "IP": device.product_precision(self.dtype, self.device),
            "PER_HEAD": problem.scores.shape[1] > 1,
            "BIAS": self.bias,
        }
        self.numbers = {
            **memory, "UNIT": unit(self._step, self.dtype.itemsize),
            "B": self.batch, "Hq": self.query_heads, "G": self.group, "M": self.rows,
            "T": self.length, "P": self.prefix_length, "C": self.documents,
            "document_mass": 1.0 if problem.document_mass is None else problem.document_mass,
            **_options(problem), **self._flags, "FIXED": self.fixed,
        }  # fmt: skip
        given = self.numbers["window"], problem.positions, self.numbers["cap"], problem.sinks
        self._without = tuple(option is None for option in given)  # in the order of OPTIONS
        self._kept: dict[Hashable, Any] = {}

    def _keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what ``make`` returned for the first call of this form."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def gradient(self, grad_output: Tensor, *others: Tensor) -> dict[str, Any]:
        """The arguments of a kernel that reads the output's gradient, and maybe ``others``."""
        steps = [step for tensor in (grad_output, *others) for step in tensor.stride()[:-1]]
        return {
            "do": grad_output, **strides("o", "bhmd", grad_output),
            "UNIT": unit(math.gcd(self._step, *steps), self.dtype.itemsize),
        }  # fmt: skip

    def row_tensor(self, *leading: int, slots: int) -> Tensor:
        shape = (*leading, self.batch, self.query_heads, slots, self.rows)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def configs(self, kernel: str, rows: int) -> tuple[Config, ...]:
        def make() -> tuple[Config, ...]:
            family = family_of(device.capability(self.device))
            return candidates(kernel, self.head_dim, self.dtype, rows, family)

        return self._keep(("configs", kernel, rows), make)

    def tuned(
        self, kernel: str, rows: int, launch: Callable[[Config], object], *flags: Hashable
    ) -> Config:
        """The configuration for a kernel at these sizes, asked for once for all calls."""
        kept = ("tuned", kernel, rows, *flags)
        chosen = self._kept.get(kept)
        if chosen is None:
            configs = self.configs(kernel, rows)
            key = (
                kernel, self.dtype, *flags, *self._flags.values(), *self._without, bucket(rows),
                bucket(self.batch * self.key_heads), bucket(self.length),
                bucket(self.length // self.documents),
            )  # fmt: skip
            chosen = choose(key, configs, launch, self.device)
            if not device.captures(self.device):  # where nothing can be timed
                self._kept[kept] = chosen
        return chosen

    @property
    def in_one_pass(self) -> bool:
        """Whether one kernel makes both the documents' part and the query's gradient."""

        def make() -> bool:
            family = family_of(device.capability(self.device))
            listed = in_one_pass(family, self.head_dim, self.dtype.itemsize)
            return listed and self.kind("both") == "both"

        return self._keep("in one pass", make)

    def kind(self, kernel: str) -> str:
        """The name of a kernel over rows in the table of tile shapes: with folding or splitting."""

        def make() -> str:
            grid = self.grid(self.configs(kernel, self.reach)[0])
            if grid.splits > 1:
                return f"{kernel}-split"
            return f"{kernel}-fold" if grid.fold else kernel

        return self._keep(("kind", kernel), make)

    def grid(self, config: Config) -> RowGrid:
        """How the rows are cut into blocks, and their keys split."""
        return self._keep(("grid", config.rows), lambda: self._cut(config.rows))

    def _cut(self, height: int) -> RowGrid:
        rows = self.group * self.rows
        blocks, elements, fold = cdiv(rows, height), self.batch, False
        folded = cdiv(self.reach, height)
        # A folded tile is not split: with so few rows, the elements' own tiles are
        # split instead, and read the shared prefix at about the same time, from the cache.
        if self.reach > rows and folded < blocks * elements and self._splits(folded) == 1:
            blocks, elements, fold = folded, 1, True
        splits = self._splits(blocks * elements)
        return RowGrid((blocks * splits, self.key_heads, elements), splits, fold)

    def _splits(self, blocks: int) -> int:
        wanted = 2 * device.processors(self.device) // (blocks * self.key_heads)
        return max(1, min(wanted, self.length // MIN_SPLIT_KEYS))


class Call(_Form):
    """One problem, reduced to what the kernels take: its form, and its tensors.

    What follows from shapes and options is worked out once for all calls that have them in common.

    Attributes:
        arguments: what depends on the problem alone, by the names of the kernels' parameters.
        plan: its work lists.
    """

    def __init__(self, problem: Problem) -> None:
        key = _form_key(problem)
        form = _forms.get(key)
        if form is None:
            if len(_forms) >= _MOST_FORMS:
                _forms.clear()
            form = _forms[key] = _Form(problem)
        self.__dict__.update(form.__dict__)
        self.problem, self.plan = problem, Plan.of(problem)
        heads = self._heads()
        key, prefix_key = _same_last_stride(problem.key, problem.prefix_key)
        value, prefix_value = _same_last_stride(problem.value, problem.prefix_value)
        self.arguments: dict[str, Any] = {
            **self.numbers, **self.plan.tensors, "q": problem.query, "k": key, "v": value,
            # Without a prefix the local ones are passed in its place.
            "pk": key if prefix_key is None else prefix_key,
            "pv": value if prefix_value is None else prefix_value,
            "sinks": None if problem.sinks is None else problem.sinks.contiguous(),
            "table": heads.order, "n_scored": heads.count, "scored": heads.scored,
        }  # fmt: skip

    def _heads(self) -> Heads:
        """Kept for all calls, but in a CUDA graph.

        A graph that read memory from outside would need it to live as long, and what it writes is
        not there before it runs.
        """
        which = self.problem.heads, self.key_heads, self.device
        if device.captures(self.device):
            return self.problem.reading.keep(
                ("heads", *which), (), lambda: _make_heads(*which, capturing=True)
            )
        return self._keep("heads", lambda: _heads(*which))

    def work_list(self, config: Config) -> dict[str, Any]:
        """The arguments of the kernels that visit documents, for tiles of a shape."""
        made = self.plan.documents_in_tiles(config.keys, config.slot)
        return {
            "tiles": made.tiles, "shorts": made.shorts, "rest": self.plan.rest,
            "counts": made.counts, "NT": made.limit,
            "weights": self.plan.weights(self.problem.scores, self.bias),
        }  # fmt: skip

    def weighed_rows(self) -> dict[str, Any]:
        """The arguments of kernels that visit no documents: which rows are scored, and weights."""
        config = self.configs("query", self.reach)[0]
        made = self.plan.documents_in_any_tiles(config.keys, config.slot)
        weights = self.plan.weights(self.problem.scores, self.bias)
        return {"counts": made.counts, "weights": weights}


_forms: dict[Hashable, _Form] = {}
_MOST_FORMS = 1024


def _form_key(problem: Problem) -> Hashable:
    """What a form depends on."""
    tensors = (
        problem.query, problem.key, problem.value, problem.scores, problem.prefix_key,
        problem.prefix_value,
    )  # fmt: skip
    query = problem.query
    return (
        query.dtype, query.device, device.product_precision(query.dtype, query.device),
        *[None if t is None else (t.shape, t.stride()) for t in tensors],
        problem.mask is None, problem.positions is None, problem.sinks is None, problem.heads,
        problem.mode, problem.document_mass, problem.scale, problem.causal, problem.window,
        problem.softcap,
    )  # fmt: skip


def _options(problem: Problem) -> dict[str, Any]:
    """Numbers that a call may add to attention, None where it does not: then none is compiled."""
    window = problem.window
    if window is not None and problem.positions is None and window >= problem.total_length:
        window = None  # it reaches all keys
    scale, cap = abs(problem.scale), None
    if problem.softcap is not None:
        scale, cap = problem.softcap, scale / problem.softcap
    return {
        # Never 0, so that a masked logit of -inf stays -inf.
        "scale": max(scale * LOG2_E, 1e-30), "cap": cap,
        "window": None if window is None else min(window, _LONGEST_WINDOW),
    }  # fmt: skip


def _strides_of_memory(problem: Problem) -> dict[str, int]:
    """Of keys and values, as the kernels take them."""
    found: dict[str, int] = {}
    for name, local, prefix in (
        ("k", problem.key, problem.prefix_key), ("v", problem.value, problem.prefix_value),
    ):  # fmt: skip
        local, prefix = _same_last_stride(local, prefix)
        found |= strides(name, "bhnd", local)
        found |= strides(f"p{name}", "bhn", local if prefix is None else prefix)
        if prefix is not None and prefix.shape[0] == 1:
            found[f"s_p{name}b"] = 0
    return found


def _same_last_stride(local: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Copy keys or values as needed: the kernels take one last stride for local ones and prefix."""
    if prefix is None or prefix.stride(-1) == local.stride(-1):
        return local, prefix
    return local.contiguous(), prefix if prefix.stride(-1) == 1 else prefix.contiguous()
