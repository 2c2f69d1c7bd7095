"""Launches the kernels: allocates what they write, and passes pointers, strides and options."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.triton.blocks import COLUMNS
from dream_kernels.triton.call import PLAN_DOCUMENTS, Call
from dream_kernels.triton.coefficients import coefficients_kernel
from dream_kernels.triton.combine import combine_kernel, join_kernel
from dream_kernels.triton.config import Config, bucket, padded_head
from dream_kernels.triton.forward import forward_kernel
from dream_kernels.triton.keys import keys_kernel
from dream_kernels.triton.mass import mass_kernel
from dream_kernels.triton.rows import rows_kernel

_COMBINE_ROWS = 16


def forward(problem: Problem, state: Tensor) -> Tensor:
    """Return the output and fill ``state`` ``[B, Hq, C + 1, M]`` with log-sum-exps."""
    call = Call(problem)
    output = torch.empty(problem.query.shape, dtype=problem.query.dtype, device=call.device)

    def launch(config: Config) -> None:
        _forward(call, config, output, state)

    launch(call.tuned(call.kind("forward"), call.reach, launch, call.fixed))
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
    kernel = call.kind("documents" if grad_query is None else "query")

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
    plan = call.any_plan()
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
        D=call.head_dim, BD=padded_head(call.head_dim), BM=rows, BC=PLAN_DOCUMENTS,
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
