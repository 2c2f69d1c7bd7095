r"""Attention over documents that are split over the ranks of a process group.

Every rank holds the keys and values of some whole documents, its *prefix*, and all ranks hold the
same short suffix: queries and local keys. The output is that of :func:`document_attention` over
all documents; it, and the gradients of what the ranks share, come out equal on all of them.

Per row and head a rank sends partial sums, never one output per document, so what travels does
not depend on how many documents there are. With the segments and factors of
:mod:`dream_kernels.reference`, rank :math:`r` holding the documents :math:`D_r` and perhaps
prefix keys outside all documents, its *rest*:

1. two log-sum-exps per row and head, over the rank's documents (``bias``: with their scores
   added) and over its rest, and for ``reweight`` that of its documents' scores, one number per
   batch element. The ranks' log-sum-exps join into those of all keys, by a maximum and a sum.
2. Now every rank knows the factors :math:`f` of its own segments, and
   :math:`\sum_{s \in r} f_s o_s`, ``D`` numbers, is summed over the ranks. The local keys are
   added afterwards, by every rank for itself.

The backward formulas need other ranks' documents in one place only,
:math:`\bar g = \sum_d w_d \bar g_d` of ``reweight``: one number per row and head, summed over the
ranks. The fixed mass asks for :math:`\bar g_\mathrm{rest}` as well, but
:math:`(1 - \mu) \bar g_\mathrm{rest} = \delta - \mu \bar g` with :math:`\delta = dO \cdot o`. Then
the queries' gradient is summed, ``D`` numbers, if it is asked for. The gradients of scores,
prefix and local keys are complete where they are computed.

So a row and head costs ``D + 4`` numbers forward and ``D + 1`` backward. These are the partial
results of the split-key kernel (:mod:`dream_kernels.triton.combine`): a rank is a split that no
document crosses.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dream_kernels.api import autocast_inputs
from dream_kernels.problem import Problem
from dream_kernels.reference import Segments, attend_within_segments, logsumexp, safe_exp
from dream_kernels.validation import build_problem, checks_values_of

KEYS_AT_A_TIME = 256


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    spans: Tensor,
    *,
    prefix: tuple[Tensor, Tensor],
    group: dist.ProcessGroup | None = None,
    mode: str = "reweight",
    heads: Sequence[int] | Tensor | None = None,
    document_mass: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """:func:`dream_kernels.document_attention` over documents split over ranks.

    Every rank of ``group`` calls it, with the same shared arguments and its own documents. The
    output is that of one process with all prefixes side by side. So is every gradient, provided
    that all ranks go backward with the same gradient of the output; the gradients of ``query``,
    ``key`` and ``value`` are then equal on all ranks and must not be summed over them again.

    Plain PyTorch on any device. Memory beyond inputs and outputs is ``O(B Hq M (C + D))`` with
    ``C`` this rank's documents; a row and head sends ``D + 4`` numbers forward and ``D + 1``
    backward, in float32 (float64 for float64 inputs).

    Args:
        query: ``[B, Hq, M, D]``, the same on all ranks.
        key: ``[B, Hkv, N, D]``, the local keys, the same on all ranks; ``M <= N``. Keys outside
            all documents that every row shall see, such as a header, may stand here in front.
        value: as ``key``.
        scores: ``[B, C]`` or ``[B, Hq, C]``, of this rank's documents.
        spans: ``[B, C, 2]``, where this rank's documents stand in its ``prefix``; a rank without
            documents names one absent one.
        prefix: ``(key, value)`` of ``[1 or B, Hkv, P, D]``, this rank's own. ``P`` and ``C`` may
            differ between ranks. Keys outside the documents count once for every rank that has
            them: mask them on all ranks but one if they are copies.
        group: the ranks; None for all of them.
        mode: as in :func:`document_attention`, the same on all ranks, as is what follows.
        heads: as in :func:`document_attention`.
        document_mass: as in :func:`document_attention`.
        scale: as in :func:`document_attention`.
        causal: whether a row sees only the local keys up to its own.
        attention_mask: ``[B, P + N]`` over this rank's prefix and the local keys.

    Returns:
        ``[B, Hq, M, D]``, the same on all ranks.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or content, or there is no process
            group. Where contents are checked (:func:`set_value_checks`) the ranks also compare
            their shared arguments, and all of them raise if one does.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group must be a process group: call torch.distributed.init_process_group")
    checks = not isinstance(query, Tensor) or checks_values_of(query)
    try:
        if prefix is None:
            raise TypeError("prefix must be a (key, value) pair, got None")
        query, key, value, joined = autocast_inputs(query, key, value, prefix)
        problem = build_problem(
            query, key, value, scores, spans, mode=mode, heads=heads, document_mass=document_mass,
            scale=scale, causal=causal, attention_mask=attention_mask, prefix=joined,
        )  # fmt: skip
        _check_layout(problem, checks)
    except (TypeError, ValueError):
        if checks:
            _agree(None, group)
        raise
    if checks:
        _agree(problem, group)
    return _ContextParallelAttention.apply(*problem.tensors, problem, group)


def _check_layout(problem: Problem, checks: bool) -> None:
    rows, local = problem.rows, problem.key.shape[2]
    if rows > local:
        raise ValueError(
            f"key must hold a local key for every row, N >= M = {rows}, got N = {local}"
        )
    if checks and (problem.spans > problem.prefix_length).any():
        raise ValueError(
            f"spans must lie in this rank's prefix of {problem.prefix_length} keys, got an end of "
            f"{int(problem.spans.max())}"
        )


def _agree(problem: Problem | None, group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks unless the arguments that they share are alike.

    Args:
        problem: this rank's call, or None if it was refused here; that rank raises by itself.
        group: the ranks.
    """
    refused = 1 << 40
    told = torch.zeros(2, dtype=torch.int64)
    if problem is None:
        told[0] = refused
    else:
        needs = [t is not None and t.requires_grad for t in problem.tensors[:4]]
        shared = (problem.query.shape, problem.key.shape, problem.query.dtype, problem.options)
        code = zlib.crc32(repr((shared, needs)).encode())
        told[0], told[1] = code, -code
        told = told.to(problem.query.device)
    dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    if problem is None:
        return
    largest, smallest = int(told[0]), -int(told[1])
    if largest == refused:
        raise ValueError("another rank of group refused its arguments; its own error says why")
    if largest != smallest:
        raise ValueError(
            "query, key, mode, heads, document_mass, scale, causal and what requires a gradient "
            "must be the same on all ranks of group, got different ones"
        )


def _sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks, in place."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM, group=group)
    return tensor


def _joint_logsumexp(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Log-sum-exps over the ranks of several tensors, which travel together."""
    own = torch.cat([part.flatten() for part in parts])
    peak = own.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    total = torch.log(_sum(safe_exp(own, peak), group)) + peak.masked_fill(peak == -torch.inf, 0.0)
    pieces = total.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts)]


@dataclass(frozen=True)
class _Part:
    """Some keys of this rank: a block of its prefix, or the local keys.

    Query heads that share keys are rows of one head: ``[B, Hkv, R, ...]`` with ``R = Hq / Hkv *
    M``, which needs no copy of the keys for each of them.

    Attributes:
        segments: of the rank's documents and the rest, as far as they lie in this part.
        key: ``[1 or B, Hkv, n, D]`` in the dtype of the sums.
        value: as ``key``.
    """

    segments: Segments
    key: Tensor
    value: Tensor

    def times(self, per_segment: Tensor, norms: Tensor) -> Tensor:
        """``x_s exp(a_j - norm_s)`` of every key ``j`` of segment ``s``: ``[B, Hkv, R, n]``."""
        share = per_segment * safe_exp(self.segments.lse, norms)
        return self.segments.per_key(share) * self.segments.within


def _fold(problem: Problem, per_head: Tensor) -> Tensor:
    """``[B, 1 or Hq, 1 or M, X]`` as ``[B, Hkv, R, X]``."""
    whole = per_head.expand(problem.batch, problem.query_heads, problem.rows, -1)
    return whole.unflatten(1, (problem.key_heads, -1)).flatten(2, 3)


def _unfold(problem: Problem, folded: Tensor) -> Tensor:
    return folded.unflatten(2, (-1, problem.rows)).flatten(1, 2)


def _prefix_parts(problem: Problem) -> Iterator[_Part]:
    """The prefix in blocks. All its keys stand before all rows, so no row is hidden from any."""
    if problem.prefix_key is None or problem.prefix_value is None:
        return
    dtype = problem.accumulate_dtype
    query = _fold(problem, problem.query)
    for begin in range(0, problem.prefix_length, KEYS_AT_A_TIME):
        end = min(begin + KEYS_AT_A_TIME, problem.prefix_length)
        key, value = problem.prefix_key[:, :, begin:end], problem.prefix_value[:, :, begin:end]
        inside = replace(
            problem,
            query=query,
            key=key.expand(problem.batch, -1, -1, -1),
            prefix_key=None,
            prefix_value=None,
            spans=(problem.spans - begin).clamp(0, end - begin),
            mask=None if problem.mask is None else problem.mask[:, begin:end],
            causal=False,
        )
        yield _Part(attend_within_segments(inside), key.to(dtype), value.to(dtype))


def _local_part(problem: Problem) -> _Part:
    """The local keys, which are all of the rest."""
    before = problem.prefix_length
    alone = replace(
        problem,
        prefix_key=None,
        prefix_value=None,
        spans=torch.zeros_like(problem.spans),
        mask=None if problem.mask is None else problem.mask[:, before:],
    )
    own = attend_within_segments(alone)
    folded = replace(own, within=_fold(problem, own.within), lse=_fold(problem, own.lse))
    dtype = problem.accumulate_dtype
    return _Part(folded, problem.key.to(dtype), problem.value.to(dtype))


@dataclass(frozen=True)
class _Totals:
    """Log-sum-exps over the keys of all ranks.

    Attributes:
        documents: ``[B, Hkv, R, 1]``, of all documents' logits; in heads that receive the scores
            of ``bias``, with them.
        rest: ``[B, Hkv, R, 1]``, of all keys outside, local ones included.
        scores: ``[B, 1 or Hq]``, of the scores of all present documents; 0 for ``bias``.
    """

    documents: Tensor
    rest: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Mixture:
    """How this rank's segments enter the output: ``sum_s factor_s exp(a_j - norm_s) v_j``.

    Attributes:
        norms: ``[B, Hkv, R, S]``.
        factors: ``[B, Hkv, R, S]``.
        weights: ``[B, Hkv, R, C]``, of the documents by their scores; 0 in rows that are not
            scored, and for ``bias``.
        mass: ``[B, Hkv, R, C]``, what plain attention gives to each document.
        mu: ``[B, Hkv, R, 1]``, the mass of all documents together.
        scored: ``[B, Hkv, R, 1]`` bool, the rows on which the scores act.
    """

    norms: Tensor
    factors: Tensor
    weights: Tensor
    mass: Tensor
    mu: Tensor
    scored: Tensor


def _head_rows(problem: Problem) -> Tensor:
    """``[B, Hkv, R, 1]`` bool: rows of heads that receive the scores."""
    heads = torch.tensor(problem.heads, device=problem.query.device)
    return _fold(problem, heads[None, :, None, None])


def _present_scores(problem: Problem, absent: float = -torch.inf) -> Tensor:
    """``[B, 1 or Hq, C]``: the scores, and ``absent`` where there is no document."""
    start, end = problem.spans.unbind(-1)
    return problem.scores.masked_fill((end <= start)[:, None, :], absent)


def _biased(problem: Problem, lse: Tensor) -> Tensor:
    """``[B, Hkv, R, C]``: the documents' log-sum-exps, with the scores where ``bias`` adds them."""
    if problem.mode == "reweight":
        return lse[..., :-1]
    added = _fold(problem, _present_scores(problem, 0.0)[:, :, None, :])
    return lse[..., :-1] + torch.where(_head_rows(problem), added, 0.0)


def _join(problem: Problem, lse: Tensor, local: _Part, group: dist.ProcessGroup | None) -> _Totals:
    """Join the log-sum-exps of the ranks; ``lse`` is of this rank's segments."""
    documents = logsumexp(_biased(problem, lse))[..., None]
    scores = logsumexp(_present_scores(problem))
    parts = [documents, lse[..., -1:]] + ([scores] if problem.mode == "reweight" else [])
    documents, rest, *joint_scores = _joint_logsumexp(parts, group)
    rest = torch.logaddexp(rest, local.segments.lse[..., -1:])
    return _Totals(documents, rest, joint_scores[0] if joint_scores else torch.zeros_like(scores))


def _mix(problem: Problem, lse: Tensor, totals: _Totals) -> _Mixture:
    everything = torch.logaddexp(totals.documents, totals.rest)
    plain = safe_exp(_biased(problem, lse), everything)
    scored = _head_rows(problem)
    norm_rest, factor_rest = everything, torch.ones_like(everything)
    mu = safe_exp(totals.documents, everything)
    factors, weights = plain, torch.zeros_like(plain)
    if problem.mode == "reweight":
        scored = scored & (totals.documents > -torch.inf)
        softmax = safe_exp(_present_scores(problem), totals.scores[..., None])
        weights = torch.where(scored, _fold(problem, softmax[:, :, None, :]), 0.0)
        if problem.document_mass is not None:
            fixed = torch.full_like(mu, problem.document_mass)
            mu = torch.where(scored, fixed.masked_fill(totals.rest == -torch.inf, 1.0), mu)
            norm_rest = torch.where(scored, totals.rest, everything)
            factor_rest = torch.where(scored, 1.0 - mu, factor_rest)
        factors = torch.where(scored, mu * weights, plain)
    return _Mixture(
        norms=torch.cat([lse[..., :-1], norm_rest], -1),
        factors=torch.cat([factors, factor_rest], -1),
        weights=weights,
        mass=plain,
        mu=mu,
        scored=scored,
    )


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        problem: Problem,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            local = _local_part(problem)
            lse = torch.full_like(local.segments.lse, -torch.inf)
            for part in _prefix_parts(problem):
                lse = torch.logaddexp(lse, part.segments.lse)
            totals = _join(problem, lse, local, group)
            mix = _mix(problem, lse, totals)
            shape = (*lse.shape[:-1], problem.head_dim)
            folded = torch.zeros(shape, dtype=lse.dtype, device=lse.device)
            for part in _prefix_parts(problem):
                folded += part.times(mix.factors, mix.norms) @ part.value
            folded = _sum(folded, group)
            folded += local.times(mix.factors, mix.norms) @ local.value
            output = _unfold(problem, folded).to(query.dtype)
        ctx.save_for_backward(
            *problem.tensors, problem.spans, problem.mask, output, lse,
            totals.documents, totals.rest, totals.scores,
        )  # fmt: skip
        ctx.options, ctx.group = problem.options, group
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        saved = ctx.saved_tensors
        problem = Problem(*saved[:8], **ctx.options)
        output, lse, totals = saved[8], saved[9], _Totals(*saved[10:])
        needs = ctx.needs_input_grad[:6]
        with torch.autocast(output.device.type, enabled=False):
            gradients = _backward(problem, output, lse, totals, grad_outputs[0], needs, ctx.group)
        return (*gradients, None, None)


def _backward(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    totals: _Totals,
    grad_output: Tensor,
    needs: Sequence[bool],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of ``problem.tensors``, None where ``needs`` has False."""
    dtype = problem.accumulate_dtype
    grad = _fold(problem, grad_output.to(dtype))
    delta = (grad * _fold(problem, output.to(dtype))).sum(-1, keepdim=True)
    mix = _mix(problem, lse, totals)
    factors = mix.factors[..., :-1]

    g_documents = torch.zeros_like(lse)
    for part in _prefix_parts(problem):
        g = part.segments.within * (grad @ part.value.transpose(-1, -2))
        g_documents += (g @ part.segments.one_hot) * safe_exp(part.segments.lse, lse)
    g_documents = g_documents[..., :-1]

    # The offsets u of dS_j = exp(a_j - norm_s) (factor_s g_j + u_s).
    g_mean, offsets, offset_rest = delta, -factors * delta, -delta
    if problem.mode == "reweight":
        g_mean = _sum((mix.weights * g_documents).sum(-1, keepdim=True), group)
        reweighted = -factors * g_documents
        if problem.document_mass is None:
            reweighted = reweighted + mix.mass * (g_mean - delta)
        else:
            offset_rest = torch.where(mix.scored, mix.mu * g_mean - delta, offset_rest)
        offsets = torch.where(mix.scored, reweighted, offsets)
    offsets = torch.cat([offsets, offset_rest], -1)

    grad_scores = None
    if needs[3]:
        per_row = torch.where(mix.scored, factors * (g_documents - g_mean), 0.0)
        grad_scores = _unfold(problem, per_row).sum(2)
        if problem.scores.shape[1] == 1:
            grad_scores = grad_scores.sum(1, keepdim=True)

    query = _fold(problem, problem.query.to(dtype))

    def of_part(part: _Part, keys: bool, values: bool) -> tuple[Tensor | None, ...]:
        """Gradients that one part gives to the queries, and those of its own keys and values."""
        g = grad @ part.value.transpose(-1, -2)
        coefficients = part.times(mix.factors, mix.norms)
        grad_logits = problem.scale * (coefficients * g + part.times(offsets, mix.norms))
        return (
            grad_logits @ part.key if needs[0] else None,
            grad_logits.transpose(-1, -2) @ query if keys else None,
            coefficients.transpose(-1, -2) @ grad if values else None,
        )

    grad_query = torch.zeros_like(query) if needs[0] else None
    prefix_keys, prefix_values = [], []
    if needs[0] or needs[4] or needs[5]:
        for part in _prefix_parts(problem):
            to_query, to_key, to_value = of_part(part, needs[4], needs[5])
            if grad_query is not None and to_query is not None:
                grad_query += to_query
            prefix_keys.append(to_key)
            prefix_values.append(to_value)
    grad_key = grad_value = None
    if grad_query is not None:
        grad_query = _sum(grad_query, group)
    if needs[0] or needs[1] or needs[2]:
        to_query, grad_key, grad_value = of_part(_local_part(problem), needs[1], needs[2])
        if grad_query is not None and to_query is not None:
            grad_query = _unfold(problem, grad_query + to_query).to(problem.query.dtype)
    return (
        grad_query,
        None if grad_key is None else grad_key.to(problem.key.dtype),
        None if grad_value is None else grad_value.to(problem.value.dtype),
        grad_scores,
        _of_prefix(problem.prefix_key, prefix_keys) if needs[4] else None,
        _of_prefix(problem.prefix_value, prefix_values) if needs[5] else None,
    )


def _of_prefix(prefix: Tensor | None, parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join the blocks' gradients ``[B, Hkv, n, D]``, summed over the batch of a shared prefix."""
    if prefix is None:
        return None
    grads = [part.sum_to_size(len(prefix), *part.shape[1:]) for part in parts if part is not None]
    return torch.cat(grads, 2).to(prefix.dtype)
