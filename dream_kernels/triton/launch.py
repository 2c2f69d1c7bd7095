"""Launches the kernels: allocates what they write, and passes pointers, strides and options."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.triton.blocks import COLUMNS, COUNTS
from dream_kernels.triton.coefficients import coefficients_kernel
from dream_kernels.triton.combine import combine_kernel, join_kernel
from dream_kernels.triton.config import Config, bucket, candidates, choose, family, padded_head
from dream_kernels.triton.forward import forward_kernel
from dream_kernels.triton.keys import keys_kernel
from dream_kernels.triton.mass import mass_kernel
from dream_kernels.triton.plan import plan_kernel
from dream_kernels.triton.rows import rows_kernel

LOG2_E = 1.0 / math.log(2.0)
# A split shorter than this many keys costs more in partial results than it gains.
MIN_SPLIT_KEYS = 256
_PLAN_BLOCK, _PLAN_DOCUMENTS = 128, 32
_COMBINE_ROWS = 16


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
        tf32 = self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        self.shape_flags = {
            "D": self.head_dim,
            "BD": padded_head(self.head_dim),
            "CAUSAL": problem.causal,
            "HAS_MASK": problem.mask is not None,
            "NEGATE": problem.scale < 0,
            "IP": "tf32" if tf32 else "ieee",
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
            documents, limit, blocks, BN=keys, SLOT=slot, BX=_PLAN_BLOCK, BC=_PLAN_DOCUMENTS,
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


def _same_last_stride(local: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kernels take one stride for the elements of a key, local or not."""
    if prefix is None or prefix.stride(-1) == local.stride(-1):
        return local, prefix
    return local.contiguous(), prefix if prefix.stride(-1) == 1 else prefix.contiguous()


def forward(problem: Problem, state: Tensor) -> Tensor:
    """Return the output and fill ``state`` ``[B, Hq, C + 1, M]`` with log-sum-exps."""
    call = Call(problem)
    output = torch.empty(problem.query.shape, dtype=problem.query.dtype, device=call.device)

    def launch(config: Config) -> None:
        _forward(call, config, output, state)

    grid = call.grid(call.configs("forward", call.reach)[0])
    kernel = "parts" if grid.fold or grid.splits > 1 else "forward"
    launch(call.tuned(kernel, call.reach, launch, call.fixed))
    return output


def _forward(call: Call, config: Config, output: Tensor, state: Tensor) -> None:
    problem, plan, heads, grid = call.problem, call.plan(config), call.heads, call.grid(config)
    splits = grid.splits
    tensors, strides = call.memory()
    part_o, part_lse = output, state
    if splits > 1:
        part_lse = call.row_tensor(splits, slots=3)
        part_o = torch.empty(
            (*part_lse.shape, call.head_dim), dtype=torch.float32, device=call.device
        )
    flags = {"BN": config.keys, "SLOT": config.slot, "FIXED": call.fixed, **call.mode_flags}
    forward_kernel[grid.shape](
        problem.query, *tensors, call.mask, heads.order, heads.count,
        plan.tiles, plan.shorts, plan.rest, plan.counts, plan.weights,
        output, state, part_o, part_lse, *problem.query.stride(), *strides,
        call.scale, call.document_mass, call.batch, call.query_heads, call.group, call.rows,
        call.length, call.prefix_length, call.documents, plan.limit, splits,
        BM=config.rows, HAS_PREFIX=call.has_prefix, FOLD=grid.fold, SPLIT=splits > 1, **flags,
        **call.shape_flags, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        blocks = triton.cdiv(call.group * call.rows, _COMBINE_ROWS)
        combine_kernel[(blocks, call.key_heads, call.batch)](
            part_o, part_lse, heads.order, heads.count, plan.tiles, plan.counts, plan.weights,
            output, state, call.document_mass, call.batch, call.query_heads, call.group,
            call.rows, call.documents, plan.limit, splits, D=call.head_dim,
            BD=padded_head(call.head_dim), BM=_COMBINE_ROWS, **flags, num_warps=8,
        )  # fmt: skip


def backward(
    problem: Problem, output: Tensor, state: Tensor, grad_output: Tensor, needs: Needs
) -> Gradients:
    call = Call(problem)
    logits = needs.query or needs.key or needs.prefix_key
    weighs = call.heads.any and (needs.scores or (logits and not call.bias))
    # dO . o_d of reweight, which all but dV hangs on, or the scores' gradient by row of bias.
    documents: Tensor | None = None
    grad_scores: Tensor | None = None
    columns = call.row_tensor(slots=COLUMNS.value)
    if weighs:
        documents = call.row_tensor(slots=call.documents + 1)
        if call.bias:
            documents.zero_()
        else:
            _rows(call, state, grad_output, columns, documents, grad_query=None)
    partial = _coefficients(
        call, output, state, grad_output, columns, documents, needs.scores, logits
    )
    grad_query = None
    if needs.query:
        grad_query = torch.empty(problem.query.shape, dtype=problem.query.dtype, device=call.device)
    if needs.query or (weighs and call.bias):
        _rows(
            call, state, grad_output, columns, documents, grad_query,
            by_document=call.bias and weighs and needs.scores,
        )  # fmt: skip
    if needs.scores:
        if not call.heads.any:
            grad_scores = torch.zeros_like(problem.scores)
        else:
            if call.bias:
                assert documents is not None
                grad_scores = documents[:, :, :-1].sum(-1)  # [B, Hq, C]
            else:
                assert partial is not None
                grad_scores = partial.sum(2)
            if problem.scores.shape[1] == 1:
                grad_scores = grad_scores.sum(1, keepdim=True)
    grad_key, grad_value = _keys(
        call, state, grad_output, columns, documents, problem.key, problem.value,
        call.prefix_length, needs.key, needs.value,
    )  # fmt: skip
    grad_prefix_key = grad_prefix_value = None
    if problem.prefix_key is not None and problem.prefix_value is not None:
        grad_prefix_key, grad_prefix_value = _keys(
            call, state, grad_output, columns, documents, problem.prefix_key,
            problem.prefix_value, 0, needs.prefix_key, needs.prefix_value,
        )  # fmt: skip
    return Gradients(
        grad_query, grad_key, grad_value, grad_scores, grad_prefix_key, grad_prefix_value
    )


def _rows(
    call: Call,
    state: Tensor,
    grad_output: Tensor,
    columns: Tensor,
    documents: Tensor | None,
    grad_query: Tensor | None,
    by_document: bool = True,
) -> None:
    """Launch ``rows_kernel``: the sums by document, the query's gradient, or both."""
    kernel = "documents" if grad_query is None else "query"

    def launch(config: Config) -> None:
        _launch_rows(call, config, state, grad_output, columns, documents, grad_query, by_document)

    launch(call.tuned(kernel, call.reach, launch, call.fixed, by_document))


def _launch_rows(
    call: Call,
    config: Config,
    state: Tensor,
    grad_output: Tensor,
    columns: Tensor,
    documents: Tensor | None,
    grad_query: Tensor | None,
    by_document: bool,
) -> None:
    problem, plan, heads, grid = call.problem, call.plan(config), call.heads, call.grid(config)
    splits = grid.splits
    tensors, strides = call.memory()
    documents = columns if documents is None else documents
    split = splits > 1
    parts = call.row_tensor(splits, slots=2) if split and by_document else columns
    into = columns if grad_query is None else grad_query
    if split and grad_query is not None:
        into = torch.empty((splits, *grad_query.shape), dtype=torch.float32, device=call.device)
    rows_kernel[grid.shape](
        problem.query, *tensors, grad_output, call.mask, heads.order, heads.count,
        plan.tiles, plan.shorts, plan.rest, plan.counts, plan.weights,
        state, columns, documents, parts, into,
        *problem.query.stride(), *strides, *grad_output.stride(),
        call.scale, problem.scale, call.batch, call.query_heads, call.group, call.rows,
        call.length, call.prefix_length, call.documents, plan.limit, splits,
        BM=config.rows, BN=config.keys, SLOT=config.slot, FIXED=call.fixed,
        HAS_PREFIX=call.has_prefix, DOCUMENTS=by_document, DQ=grad_query is not None,
        FOLD=grid.fold, SPLIT=split, **call.shape_flags, **call.mode_flags,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split and by_document:
        blocks = triton.cdiv(call.group * call.rows, _COMBINE_ROWS)
        join_kernel[(blocks, call.key_heads, call.batch)](
            parts, heads.order, heads.count, plan.tiles, plan.counts, documents,
            call.batch, call.query_heads, call.group, call.rows, call.documents, plan.limit,
            splits, BM=_COMBINE_ROWS, BN=config.keys, SLOT=config.slot, REST=call.fixed,
            num_warps=1,
        )  # fmt: skip
    if split and grad_query is not None:
        grad_query.copy_(into.sum(0))


def _coefficients(
    call: Call,
    output: Tensor,
    state: Tensor,
    grad_output: Tensor,
    columns: Tensor,
    documents: Tensor | None,
    scores: bool,
    logits: bool,
) -> Tensor | None:
    """Launch ``coefficients_kernel``; return the scores' gradient by row block, if it is made."""
    plan = call.plan(call.configs("query", call.rows)[0])
    rows = min(32, max(16, bucket(call.rows)))
    blocks = triton.cdiv(call.rows, rows)
    by_document = documents is not None and not call.bias
    partial = None
    if by_document and scores:
        partial = torch.empty(
            (call.batch, call.query_heads, blocks, call.documents),
            dtype=torch.float32, device=call.device,
        )  # fmt: skip
    coefficients_kernel[(blocks, call.query_heads, call.batch)](
        output, grad_output, call.spans, call.heads.scored, plan.counts, plan.weights, state,
        columns if documents is None else documents, columns,
        columns if partial is None else partial, *grad_output.stride(), call.document_mass,
        call.query_heads, call.rows, call.length, call.documents,
        D=call.head_dim, BD=padded_head(call.head_dim), BM=rows, BC=_PLAN_DOCUMENTS,
        FIXED=call.fixed, DOCUMENTS=by_document, SCORES=partial is not None,
        LOGITS=logits, **call.mode_flags, num_warps=8,
    )  # fmt: skip
    return partial


def _keys(
    call: Call,
    state: Tensor,
    grad_output: Tensor,
    columns: Tensor,
    documents: Tensor | None,
    key: Tensor,
    value: Tensor,
    first: int,
    needs_key: bool,
    needs_value: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch ``keys_kernel`` over one segment of memory, if its gradients are needed."""
    grad_key, grad_value = (
        torch.empty(t.shape, dtype=t.dtype, device=call.device) if needed else None
        for t, needed in ((key, needs_key), (value, needs_value))
    )
    if key.shape[2] == 0 or not (needs_key or needs_value):
        return grad_key, grad_value
    problem = call.problem
    documents = columns if documents is None else documents

    def launch(config: Config) -> None:
        plan = call.plan(config, segment=True)
        keys_kernel[(triton.cdiv(key.shape[2], config.keys), call.key_heads, key.shape[0])](
            problem.query, key, value, grad_output, call.mask, call.heads.scored,
            plan.segment, plan.counts, plan.weights, state, columns, documents,
            key if grad_key is None else grad_key, value if grad_value is None else grad_value,
            *problem.query.stride(), *key.stride(), *value.stride(), *grad_output.stride(),
            call.scale, abs(problem.scale), call.batch, call.query_heads, call.group, call.rows,
            call.length, call.documents, first, key.shape[2],
            BM=config.rows, BN=config.keys, SHARED=key.shape[0] < call.batch, DK=needs_key,
            DV=needs_value, **call.shape_flags, **call.mode_flags,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    launch(
        call.tuned("keys", call.rows, launch, needs_key, needs_value, bucket(key.shape[2]))
    )  # fmt: skip
    return grad_key, grad_value


def mass(problem: Problem) -> Tensor:
    call = Call(problem)
    state = call.row_tensor(slots=call.documents + 1)
    tensors, strides = call.memory()

    def launch(config: Config) -> None:
        plan = call.plan(config)
        blocks = triton.cdiv(call.group * call.rows, config.rows)
        mass_kernel[(blocks, call.key_heads, call.batch)](
            problem.query, tensors[0], tensors[2], call.mask, call.heads.order,
            plan.tiles, plan.shorts, plan.rest, plan.counts, state,
            *problem.query.stride(), *strides[:4], *strides[8:11], call.scale, call.batch,
            call.query_heads, call.group, call.rows, call.length, call.prefix_length,
            call.documents, plan.limit,
            BM=config.rows, BN=config.keys, SLOT=config.slot, HAS_PREFIX=call.has_prefix,
            **call.shape_flags, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    launch(call.tuned("mass", call.group * call.rows, launch))
    start, end = problem.spans.unbind(-1)
    total = state[:, :, -1:]
    seen = (end > start)[:, None, :, None] & (total != -torch.inf)
    share = torch.where(seen, torch.exp2(state[:, :, :-1] - total), 0.0)
    return share.transpose(-1, -2).contiguous()
