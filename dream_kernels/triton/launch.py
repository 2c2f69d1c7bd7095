"""Launches the kernels: allocates what they write and selects their options."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.triton.blocks import COLUMNS, NORM, OFFSET
from dream_kernels.triton.call import (
    DOCUMENT_BLOCK,
    LOG2_E,
    Call,
    strides,
    tile_arguments,
)
from dream_kernels.triton.coefficients import coefficients_kernel
from dream_kernels.triton.combine import combine_kernel, join_kernel
from dream_kernels.triton.forward import forward_kernel
from dream_kernels.triton.keys import keys_kernel
from dream_kernels.triton.launcher import run
from dream_kernels.triton.mass import mass_kernel
from dream_kernels.triton.plan import cdiv
from dream_kernels.triton.rows import rows_kernel
from dream_kernels.triton.tiles import Config
from dream_kernels.triton.tuning import bucket

_COMBINE_ROWS = 16


def forward(problem: Problem, state: Tensor, o_part: Tensor | None = None) -> Tensor:
    """Return the output and fill ``state`` ``[B, Hq, C + 1, M]`` with log-sum-exps.

    The scored rows of ``o_part`` ``[B, Hq, M, D]`` get what the documents alone give, or with a
    fixed mass what the rest alone gives.
    """
    call = Call(problem)
    output = torch.empty(problem.query.shape, dtype=problem.query.dtype, device=call.device)

    def launch(config: Config) -> None:
        _forward(call, config, output, state, o_part)

    launch(call.tuned(call.kind("forward"), call.reach, launch, call.fixed))
    return output


def _forward(
    call: Call, config: Config, output: Tensor, state: Tensor, o_part: Tensor | None
) -> None:
    work, grid = call.work_list(config), call.grid(config)
    part_o, part_lse = output, state
    if grid.splits > 1:
        part_lse = call.row_tensor(grid.splits, slots=3)
        part_o = torch.empty(
            (*part_lse.shape, call.head_dim), dtype=torch.float32, device=call.device
        )
    arguments = {
        **call.arguments, **work, **grid.arguments, **tile_arguments(config),
        "o": output, "state": state, "part_o": part_o, "part_lse": part_lse,
        "o_part": output if o_part is None else o_part,
        "KEEP": o_part is not None,
    }  # fmt: skip
    run(
        forward_kernel, grid.shape, arguments, num_warps=config.warps, num_stages=config.stages
    )  # fmt: skip
    if grid.splits > 1:
        run(combine_kernel, _combine_grid(call), {**arguments, "BM": _COMBINE_ROWS}, num_warps=8)


def _combine_grid(call: Call) -> tuple[int, int, int]:
    return cdiv(call.group * call.rows, _COMBINE_ROWS), call.key_heads, call.batch


def backward(
    problem: Problem,
    output: Tensor,
    saved: tuple[Tensor, ...],
    grad_output: Tensor,
    needs: Needs,
) -> Gradients:
    call = Call(problem)
    state = saved[0]
    keys = needs.key or needs.prefix_key
    logits = needs.query or keys
    weighs = call.any_head and (needs.scores or (logits and not call.bias))
    # Reweight takes a pass for dO . o_d where it is not made along with the query's gradient.
    apart = weighs and not call.bias and not (needs.query and call.in_one_pass)
    # dO . o_d of reweight, on which all but dV depends, or the scores' gradient by row of bias.
    documents: Tensor | None = None
    grad_scores: Tensor | None = None
    columns = call.row_tensor(slots=COLUMNS.value)
    if weighs:
        documents = call.row_tensor(slots=call.documents + 1)
        if call.bias:
            documents.zero_()
    if apart:
        _rows(call, state, grad_output, columns, documents, grad_query=None)
    weigh_rows = partial(_coefficients, call, output, saved[-1], state, grad_output, columns)
    by_rows = weigh_rows(
        documents if apart else None, needs.scores, logits or (needs.sinks and call.fixed)
    )
    grad_query = None
    if needs.query:
        grad_query = torch.empty(problem.query.shape, dtype=problem.query.dtype, device=call.device)
    if needs.query or (weighs and not apart):
        _rows(
            call, state, grad_output, columns, documents, grad_query,
            by_document=weighs and not apart,
        )  # fmt: skip
    if weighs and not (apart or call.bias) and (needs.scores or keys):
        by_rows = weigh_rows(documents, needs.scores, keys, fill=False)
    if needs.scores:
        if not call.any_head:
            grad_scores = torch.zeros_like(problem.scores)
        else:
            if call.bias:
                assert documents is not None
                grad_scores = documents[:, :, :-1].sum(-1)  # [B, Hq, C]
            else:
                assert by_rows is not None
                grad_scores = by_rows.sum(2)
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
        grad_query, grad_key, grad_value, grad_scores, grad_prefix_key, grad_prefix_value,
        _sinks(problem, columns) if needs.sinks else None,
    )  # fmt: skip


def _sinks(problem: Problem, columns: Tensor) -> Tensor:
    """The gradient of a key without a value, from the rows' columns; see README.md."""
    assert problem.sinks is not None
    norm, offset = columns[:, :, NORM.value], columns[:, :, OFFSET.value]
    return (torch.exp2(problem.sinks[:, None] * LOG2_E - norm) * offset).sum((0, 2))


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
    kernel = "both"
    if call.bias or not by_document or grad_query is None:
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
    work, grid = call.work_list(config), call.grid(config)
    split = grid.splits > 1
    parts = call.row_tensor(grid.splits, slots=2) if split and by_document else columns
    into = columns if grad_query is None else grad_query
    if split and grad_query is not None:
        into = torch.empty(
            (grid.splits, *grad_query.shape), dtype=torch.float32, device=call.device
        )
    arguments = {
        **call.arguments, **work, **grid.arguments, **tile_arguments(config),
        **call.gradient(grad_output),
        "state": state, "columns": columns, "parts": parts,
        "documents": columns if documents is None else documents,
        "dq": into, "dq_scale": call.problem.scale,
        "DOCUMENTS": by_document, "DQ": grad_query is not None,
    }  # fmt: skip
    run(rows_kernel, grid.shape, arguments, num_warps=config.warps, num_stages=config.stages)
    if split and by_document:
        run(join_kernel, _combine_grid(call), {**arguments, "BM": _COMBINE_ROWS}, num_warps=1)
    if split and grad_query is not None:
        grad_query.copy_(into.sum(0))


def _coefficients(
    call: Call,
    output: Tensor,
    o_part: Tensor,
    state: Tensor,
    grad_output: Tensor,
    columns: Tensor,
    documents: Tensor | None,
    scores: bool,
    logits: bool,
    fill: bool = True,
) -> Tensor | None:
    """Launch ``coefficients_kernel``; return the scores' gradient by row block, if it is made."""
    rows = min(32, max(16, bucket(call.rows)))
    blocks = cdiv(call.rows, rows)
    by_document = documents is not None and not call.bias
    by_rows = None
    if by_document and scores:
        by_rows = torch.empty(
            (call.batch, call.query_heads, blocks, call.documents),
            dtype=torch.float32, device=call.device,
        )  # fmt: skip
    own = {
        "o": output, "o_part": o_part, **call.gradient(grad_output),
        "state": state, "columns": columns,
        "documents": columns if documents is None else documents,
        "partial": columns if by_rows is None else by_rows,
        "BM": rows, "BC": DOCUMENT_BLOCK,
        "DOCUMENTS": by_document, "SCORES": by_rows is not None, "LOGITS": logits, "FILL": fill,
    }  # fmt: skip
    run(
        coefficients_kernel, (blocks, call.query_heads, call.batch),
        {**call.arguments, **call.weighed_rows(), **own}, num_warps=8,
    )  # fmt: skip
    return by_rows


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
    own = {
        "k": key, **strides("k", "bhnd", key), "v": value, **strides("v", "bhnd", value),
        **call.gradient(grad_output, key, value),
        "state": state, "columns": columns,
        "documents": columns if documents is None else documents,
        "dk": key if grad_key is None else grad_key,
        "dv": value if grad_value is None else grad_value,
        "dk_scale": abs(call.problem.scale), "first_key": first, "n_keys": key.shape[2],
        "SHARED": key.shape[0] < call.batch, "DK": needs_key, "DV": needs_value,
        "segment": call.plan.segment,
    }  # fmt: skip

    def launch(config: Config) -> None:
        run(
            keys_kernel, (cdiv(key.shape[2], config.keys), call.key_heads, key.shape[0]),
            {**call.arguments, **call.weighed_rows(), **tile_arguments(config), **own},
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    launch(
        call.tuned("keys", call.rows, launch, needs_key, needs_value, bucket(key.shape[2]))
    )  # fmt: skip
    return grad_key, grad_value


def mass(problem: Problem) -> Tensor:
    call = Call(problem)
    state = call.row_tensor(slots=call.documents + 1)

    def launch(config: Config) -> None:
        arguments = {
            **call.arguments, **call.work_list(config), **tile_arguments(config),
            "state": state,
        }  # fmt: skip
        blocks = cdiv(call.group * call.rows, config.rows)
        run(
            mass_kernel, (blocks, call.key_heads, call.batch), arguments,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    launch(call.tuned("mass", call.group * call.rows, launch))
    start, end = problem.spans.unbind(-1)
    total = state[:, :, -1:]
    seen = (end > start)[:, None, :, None] & (total != -torch.inf)
    share = torch.where(seen, torch.exp2(state[:, :, :-1] - total), 0.0)
    return share.transpose(-1, -2).contiguous()
