r"""The operator in plain PyTorch: the specification that every other implementation must meet.

The keys that a row sees fall into *segments*: one per document, and one, the *rest*, for the keys
outside all documents. Attention, plain or with scores, is then two choices, a segment and a key
inside it:

.. math:: o = \sum_s f_s o_s, \qquad o_s = \sum_{j \in s} p_{j|s} v_j, \qquad
          p_{j|s} = \exp(a_j - \ell_s), \quad \ell_s = \log \sum_{j \in s} \exp a_j

and only the *factors* :math:`f` differ:

- plain: :math:`f = \mathrm{softmax}(\ell)`,
- bias: :math:`f = \mathrm{softmax}(\ell + \mathrm{scores})`, the rest having score 0,
- reweight: :math:`f_d = \mu w_d`, :math:`f_\mathrm{rest} = 1 - \mu`, with
  :math:`w = \mathrm{softmax}(\mathrm{scores})` over the present documents and :math:`\mu` the mass
  that plain attention gives to all documents together, or the fixed ``document_mass``.

With :math:`g_j = dO \cdot v_j`, :math:`\bar g_s = dO \cdot o_s` and :math:`\delta = dO \cdot o`,
the gradient in the logit of key :math:`j` of segment :math:`s` is

.. math:: dS_j = p_{j|s} \, \bigl( f_s (g_j - \bar g_s) + t_s \bigr),

where :math:`t_s = \partial L / \partial \ell_s` is

- plain and bias: :math:`f_s (\bar g_s - \delta)`,
- reweight: :math:`m_d (\bar g - \delta)` for documents and
  :math:`m_\mathrm{rest} (\bar g_\mathrm{rest} - \delta)` for the rest, with :math:`m` the plain
  masses and :math:`\bar g = \sum_d w_d \bar g_d`; and 0 when the mass is fixed.

The gradient in the scores is :math:`t_d` for bias and :math:`\mu w_d (\bar g_d - \bar g)` for
reweight, summed over rows and heads.

A *sink* is one more entry of the rest, with a logit of its own and the value 0: it counts in
:math:`\ell_\mathrm{rest}`, and its gradient is :math:`dS` with :math:`g = 0`. With a *soft cap*
:math:`c` the logits are :math:`a = c \tanh(a' / c)`, and the gradient in :math:`a'` is
:math:`dS (1 - a^2 / c^2)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.spans import document_of_key, near_keys, scored_rows, visible_keys


def _join(prefix: Tensor | None, local: Tensor, dtype: torch.dtype) -> Tensor:
    if prefix is None:
        return local.to(dtype)
    return torch.cat([prefix.expand(local.shape[0], -1, -1, -1), local], dim=2).to(dtype)


def safe_exp(log: Tensor, normalizer: Tensor) -> Tensor:
    """``exp(log - normalizer)``, and 0 where the normaliser is that of an empty set."""
    empty = normalizer == -torch.inf
    return torch.exp(log - normalizer.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)


def logsumexp(log: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, -inf with zero gradient for an empty set."""
    peak = log.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = torch.exp(log - peak).sum(-1, keepdim=True)
    empty = total == 0
    out = torch.log(total.masked_fill(empty, 1.0)) + peak
    return out.masked_fill(empty, -torch.inf).squeeze(-1)


@dataclass(frozen=True)
class Segments:
    """Attention inside every segment; the last of the ``S = C + 1`` segments is the rest.

    Attributes:
        of_key: ``[B, 1, 1, T]`` int64, the segment of each key.
        one_hot: ``[B, 1, T, S]``, the same as a membership matrix.
        within: ``[B, Hq, M, T]``, ``p_{j|s}``.
        lse: ``[B, Hq, M, S]``, log-sum-exp of the visible logits, -inf where nothing is visible.
        slope: ``[B, Hq, M, T]``, the derivative of the soft cap, or None without one.
    """

    of_key: Tensor
    one_hot: Tensor
    within: Tensor
    lse: Tensor
    slope: Tensor | None

    @property
    def lse_all(self) -> Tensor:
        return logsumexp(self.lse)[..., None]

    @property
    def mass(self) -> Tensor:
        """``[B, Hq, M, S]``: what plain attention gives to each segment."""
        return safe_exp(self.lse, self.lse_all)

    def per_key(self, per_segment: Tensor) -> Tensor:
        """Spread ``[B, Hq, M, S]`` over the keys: ``[B, Hq, M, T]``."""
        batch, heads, rows, _ = per_segment.shape
        index = self.of_key.expand(batch, heads, rows, -1)
        return per_segment.gather(-1, index)


def attend_within_segments(problem: Problem) -> Segments:
    """Compute the logits and their softmax inside every segment."""
    dtype, length = problem.accumulate_dtype, problem.total_length
    groups = problem.query_heads // problem.key_heads
    key = _join(problem.prefix_key, problem.key, dtype).repeat_interleave(groups, dim=1)
    logits = problem.scale * problem.query.to(dtype) @ key.transpose(-1, -2)
    slope = None
    if problem.softcap is not None:
        capped = torch.tanh(logits / problem.softcap)
        logits, slope = problem.softcap * capped, 1 - capped.square()
    of_key = document_of_key(problem.spans, length)[:, None, None, :]
    logits = logits.masked_fill(~_visible(problem, of_key), -torch.inf)

    segments = problem.documents + 1
    one_hot = torch.nn.functional.one_hot(of_key.squeeze(2), segments).to(dtype)
    index = of_key.expand_as(logits)
    peak = logits.new_full((*logits.shape[:-1], segments), -torch.inf)
    peak = peak.scatter_reduce(-1, index, logits.detach(), "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = torch.exp(logits - peak.gather(-1, index)) @ one_hot
    empty = total == 0
    lse = (torch.log(total.masked_fill(empty, 1.0)) + peak).masked_fill(empty, -torch.inf)
    if problem.sinks is not None:
        sinks = problem.sinks[:, None].expand_as(lse[..., -1])
        rest = logsumexp(torch.stack([lse[..., -1], sinks], dim=-1))
        lse = torch.cat([lse[..., :-1], rest[..., None]], dim=-1)
    return Segments(of_key, one_hot, safe_exp(logits, lse.gather(-1, index)), lse, slope)


def _visible(problem: Problem, of_key: Tensor) -> Tensor:
    """``[B, 1 or Hq, M, T]`` bool: the keys that each row sees."""
    rows, length = problem.rows, problem.total_length
    visible = visible_keys(rows, length, problem.mask, problem.causal, problem.spans).unsqueeze(1)
    if problem.window is None:
        return visible
    near = near_keys(rows, length, problem.window, problem.positions, visible.device)
    of_documents = _scored(problem) & (of_key < problem.documents)
    return visible & (near.unsqueeze(1) | of_documents)


def document_weights(problem: Problem) -> Tensor:
    """``[B, 1 or Hq, C]``: softmax of the scores over the present documents, 0 for the absent."""
    start, end = problem.spans.unbind(-1)
    scores = problem.scores.masked_fill((end <= start)[:, None, :], -torch.inf)
    return safe_exp(scores, logsumexp(scores)[..., None])


def _scored(problem: Problem) -> Tensor:
    """``[B, Hq, M, 1]`` bool: where the scores act."""
    rows = scored_rows(problem.rows, problem.total_length, problem.spans, problem.causal)
    heads = torch.tensor(problem.heads, device=rows.device)
    return (heads[None, :, None] & rows[:, None, :])[..., None]


def _mu(problem: Problem, segments: Segments) -> Tensor:
    """``[B, Hq, M, 1]``: the mass of all documents together."""
    mass = segments.mass
    if problem.document_mass is None:
        return mass[..., :-1].sum(-1, keepdim=True)
    no_rest = segments.lse[..., -1:] == -torch.inf
    return torch.full_like(mass[..., :1], problem.document_mass).masked_fill(no_rest, 1.0)


def segment_factors(problem: Problem, segments: Segments) -> Tensor:
    """``[B, Hq, M, S]``: the factors ``f`` of the module's formula."""
    plain = segments.mass
    start, end = problem.spans.unbind(-1)
    if problem.mode == "bias":
        scores = problem.scores.masked_fill((end <= start)[:, None, :], 0.0)
        biased = segments.lse + torch.nn.functional.pad(scores, (0, 1))[:, :, None, :]
        scored = safe_exp(biased, logsumexp(biased)[..., None])
    else:
        mu = _mu(problem, segments)
        weights = document_weights(problem)[:, :, None, :]
        rest = plain[..., -1:] if problem.document_mass is None else 1.0 - mu
        scored = torch.cat([mu * weights, rest], dim=-1)
    return torch.where(_scored(problem), scored, plain)


def attend(problem: Problem) -> Tensor:
    """The forward formulas, differentiable by autograd in every tensor of ``problem``.

    Returns:
        ``[B, Hq, M, Dv]`` in the dtype of ``query``.
    """
    segments = attend_within_segments(problem)
    factors = segment_factors(problem, segments)
    groups = problem.query_heads // problem.key_heads
    value = _join(problem.prefix_value, problem.value, problem.accumulate_dtype)
    value = value.repeat_interleave(groups, dim=1)
    output = (segments.per_key(factors) * segments.within) @ value
    return output.to(problem.query.dtype)


class ReferenceImplementation:
    """Plain PyTorch on any device, with the closed-form backward; memory grows with ``M * T``."""

    name = "reference"
    any_value_dim = True

    def why_not(self, problem: Problem) -> str | None:
        return None

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        return attend(problem), ()

    def empty_saved(self, problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
        return ()

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        dtype = problem.accumulate_dtype
        groups = problem.query_heads // problem.key_heads
        grad = grad_output.to(dtype)
        segments = attend_within_segments(problem)
        factors = segment_factors(problem, segments)
        value = _join(problem.prefix_value, problem.value, dtype).repeat_interleave(groups, dim=1)

        g = grad @ value.transpose(-1, -2)  # [B, Hq, M, T]
        g_segment = (segments.within * g) @ segments.one_hot  # [B, Hq, M, S]
        delta = (factors * g_segment).sum(-1, keepdim=True)
        scored = _scored(problem)
        t = factors * (g_segment - delta)
        if problem.mode == "bias":
            grad_scores = t[..., :-1]
        else:
            mu, weights = _mu(problem, segments), document_weights(problem)[:, :, None, :]
            g_documents = (weights * g_segment[..., :-1]).sum(-1, keepdim=True)
            grad_scores = mu * weights * (g_segment[..., :-1] - g_documents)
            if problem.document_mass is None:
                e = torch.cat([g_documents.expand_as(weights * mu), g_segment[..., -1:]], dim=-1)
                reweighted = segments.mass * (e - delta)
            else:
                reweighted = torch.zeros_like(t)
            t = torch.where(scored, reweighted, t)
        grad_scores = grad_scores.masked_fill(~scored, 0.0).sum(2)  # [B, Hq, C]
        if problem.scores.shape[1] == 1:
            grad_scores = grad_scores.sum(1, keepdim=True)

        grad_logits = segments.within * (
            segments.per_key(factors) * (g - segments.per_key(g_segment)) + segments.per_key(t)
        )
        if segments.slope is not None:
            grad_logits = grad_logits * segments.slope
        grad_sinks = None
        if needs.sinks:
            assert problem.sinks is not None
            share = safe_exp(problem.sinks[:, None], segments.lse[..., -1])  # [B, Hq, M]
            grad_sinks = share * (t[..., -1] - factors[..., -1] * g_segment[..., -1])
        grad_query = grad_key = grad_value = None
        if needs.query:
            key = _join(problem.prefix_key, problem.key, dtype).repeat_interleave(groups, dim=1)
            grad_query = (problem.scale * grad_logits @ key).to(problem.query.dtype)
        if needs.key or needs.prefix_key:
            grad_key = problem.scale * grad_logits.transpose(-1, -2) @ problem.query.to(dtype)
        if needs.value or needs.prefix_value:
            coefficients = segments.per_key(factors) * segments.within
            grad_value = coefficients.transpose(-1, -2) @ grad
        return Gradients(
            query=grad_query,
            key=self._local(problem, grad_key) if needs.key else None,
            value=self._local(problem, grad_value) if needs.value else None,
            scores=grad_scores if needs.scores else None,
            prefix_key=self._prefix(problem, grad_key) if needs.prefix_key else None,
            prefix_value=self._prefix(problem, grad_value) if needs.prefix_value else None,
            sinks=None if grad_sinks is None else grad_sinks.sum((0, 2)),
        )

    def mass(self, problem: Problem) -> Tensor:
        return attend_within_segments(problem).mass[..., :-1].contiguous()

    @staticmethod
    def _fold_groups(problem: Problem, grad: Tensor) -> Tensor:
        return grad.unflatten(1, (problem.key_heads, -1)).sum(2)

    def _local(self, problem: Problem, grad: Tensor | None) -> Tensor:
        assert grad is not None
        local = self._fold_groups(problem, grad[:, :, problem.prefix_length :])
        return local.to(problem.key.dtype)

    def _prefix(self, problem: Problem, grad: Tensor | None) -> Tensor:
        assert grad is not None and problem.prefix_key is not None
        prefix = self._fold_groups(problem, grad[:, :, : problem.prefix_length])
        if problem.prefix_key.shape[0] == 1:
            prefix = prefix.sum(0, keepdim=True)
        return prefix.to(problem.key.dtype)
