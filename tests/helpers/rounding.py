r"""How far the roundings of a correct implementation move each element of its results.

The statistical form of a running error analysis (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., sections 2.8, 3.3 and 4.5): the formulas of ``dream_kernels.reference`` in
float64, and beside each intermediate the error that it may carry, to first order, element by
element. Two kinds of roundings are distinguished.

- *Sums in float32*, of unit roundoff :math:`u`. A sum of :math:`n` products, in any order and in
  any number of parts, has an error of :math:`u \sqrt n / 3 \sum_i |a_i b_i|` in the root mean
  square at most: a rounding is :math:`u / \sqrt 3` of a partial sum, and the partial sums are
  largest where all terms have one sign and follow each other. Logits, exponentials, normalisers
  and factors carry their errors to all that is made of them, where they may all point the same
  way: they are added up by magnitude.
- *Roundings to the inputs' dtype*, of unit :math:`r`: of probabilities and of logits' gradients, or
  of two parts of these, on their way into a product, of the output that the backward reads, and of
  every result. They are independent, and :math:`r / \sqrt 3` in the root mean square at most:
  squares are added up.

An implementation that rounds less is better than this. No library's order of summation matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dream_kernels import reference
from dream_kernels.problem import Problem

# The part of errors added up by magnitude that is left of them in the root mean square: each stage
# of the formulas takes the worst signs of the stage before, and they do not all occur together.
ALIGNED = 0.25


@dataclass(frozen=True)
class Spread:
    """The error of a tensor: ``linear`` was added up by magnitude, ``square`` is a variance."""

    linear: Tensor
    square: Tensor


class Analysis:
    """The errors of one call. Names and shapes as in ``reference``; ``*_error`` is that of ``*``.

    Args:
        problem: in float64, with the numbers that were given in ``dtype``.
        grad: the output's gradient, as ``problem``.
        dtype: of the call.
        kept_outputs: whether the backward may read each document's output, rounded to ``dtype``.
    """

    def __init__(
        self, problem: Problem, grad: Tensor, dtype: torch.dtype, kept_outputs: bool = False
    ) -> None:
        self.problem, self.grad = problem, grad
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.u = torch.finfo(wide).eps / 2
        self.r = torch.finfo(dtype).eps / 2 / math.sqrt(3)
        self.smallest = torch.finfo(dtype).smallest_normal * self.r
        self.scored = reference._scored(problem)
        self.groups = problem.query_heads // problem.key_heads
        self.segments = reference.attend_within_segments(problem)
        self.within, self.mass = self.segments.within, self.segments.mass
        self.factors = reference.segment_factors(problem, self.segments)
        self.weights = reference.document_weights(problem)[:, :, None, :]
        self.coefficients = self.segments.per_key(self.factors) * self.within
        self.key = self._joined(problem.prefix_key, problem.key)
        self.value = self._joined(problem.prefix_value, problem.value)
        self.output = self.coefficients @ self.value
        # The scores' gradient is a sum over rows, and over heads that share the scores.
        self.summed = (1, 2) if problem.scores.shape[1] == 1 else (2,)
        self.over_head = self._sum_of(problem.head_dim)
        self.over_value = self._sum_of(problem.value_dim)
        self.over_keys = self._sum_of(problem.total_length)
        self.over_rows = self._sum_of(problem.rows * self.groups)
        self._factors()
        self._rows(kept_outputs)
        self._logits()
        self.of_scores = self._of_scores()

    def _joined(self, prefix: Tensor | None, local: Tensor) -> Tensor:
        return reference._join(prefix, local, local.dtype).repeat_interleave(self.groups, 1)

    def _sum_of(self, count: int) -> float:
        """The error of a sum of so many products, relative to their sum of magnitudes."""
        return self.u * (math.sqrt(count) + 2) / 3

    def _rounded(self, x: Tensor) -> Tensor:
        """The variance that a rounding of ``x`` to the inputs' dtype adds, subnormals included."""
        return (self.r * x).square() + self.smallest**2

    def _per_segment(self, per_key: Tensor) -> Tensor:
        """Sum ``[B, Hq, M, T]`` over the keys of every segment: ``[B, Hq, M, S]``."""
        return per_key @ self.segments.one_hot

    def _factors(self) -> None:
        """The errors of ``p`` (relative), of masses, factors and coefficients."""
        sizes = abs(self.problem.scale) * self.problem.query.abs() @ self.key.abs().mT
        exponent = (self.over_head + self.u) * sizes
        slope, cap = self.segments.slope, self.problem.softcap
        if slope is not None and cap is not None:
            # tanh has an error of its own, relative to its value
            capped = (1 - slope).sqrt()
            exponent = slope * exponent + 4 * self.u * cap * capped
            self.slope_error = 2 * capped * exponent / cap + self.u
        exponent = exponent + 2 * self.u
        lse = self._per_segment(self.within * exponent) + self.over_keys
        if self.problem.sinks is not None:
            sinks = self.problem.sinks[:, None]
            self.sink = reference.safe_exp(sinks, self.segments.lse[..., -1])  # [B, Hq, M]
            lse[..., -1] += self.sink * self.u * (sinks.abs() + 2)
            self.sink_error = self.sink * (self.u * (sinks.abs() + 2) + lse[..., -1])
        self.within_error = exponent + self.segments.per_key(lse)
        self.mass_error = self.mass * (lse + (self.mass * lse).sum(-1, keepdim=True))
        scored = self._scored_factors(lse)
        self.factors_error = torch.where(self.scored, scored, self.mass_error)
        self.coefficients_error = (
            self.coefficients * self.within_error
            + self.segments.per_key(self.factors_error) * self.within
        )

    def _scored_factors(self, lse: Tensor) -> Tensor:
        problem, u = self.problem, self.u
        scores = problem.scores.clamp(min=-1e9)[:, :, None, :]
        exponent = u * ((scores - scores.amax(-1, keepdim=True)).abs() + 2) + self.over_keys
        exponent = exponent + (self.weights * exponent).sum(-1, keepdim=True)
        self.weights_error = self.weights * exponent
        if problem.mode == "bias":
            biased = lse + u * torch.nn.functional.pad(scores, (0, 1)).abs()
            return self.factors * (biased + (self.factors * biased).sum(-1, keepdim=True))
        mu = reference._mu(problem, self.segments)
        mu_error, rest_error = torch.full_like(mu, u), torch.full_like(mu, u)
        if problem.document_mass is None:
            mu_error = mu_error + self.mass_error[..., :-1].sum(-1, keepdim=True)
            rest_error = mu_error + self.mass_error[..., -1:]
        return torch.cat([mu_error * self.weights + mu * self.weights_error, rest_error], -1)

    def _rows(self, kept_outputs: bool) -> None:
        """``g``, its mean over each segment and over the documents, ``delta``, and their errors."""
        grad, value, within = self.grad, self.value, self.within
        self.g = grad @ value.mT
        size = self.g.abs()
        self.g_error = self.over_value * (grad.abs() @ value.abs().mT)
        self.mean = self._per_segment(within * self.g)
        linear = within * (self.g_error + size * (self.within_error + self.over_keys))
        square = torch.zeros_like(self.mean)
        if kept_outputs:
            for s in range(square.shape[-1]):
                output = (within * self.segments.one_hot[..., s].unsqueeze(-2)) @ value
                square[..., s] = (self.r * grad * output).square().sum(-1)
        self.mean_error = Spread(self._per_segment(linear), square)

        weights, of_document, square = self.weights, self.mean[..., :-1], square[..., :-1]
        linear = weights * self.mean_error.linear[..., :-1] + self.weights_error * of_document.abs()
        self.documents = (weights * of_document).sum(-1, keepdim=True)
        self.documents_error = Spread(
            linear.sum(-1, keepdim=True), (weights.square() * square).sum(-1, keepdim=True)
        )

        # delta is dO . o, with o summed from rounded probabilities and rounded itself
        linear = size * (self.coefficients_error + self.over_keys * self.coefficients)
        linear = (linear + self.coefficients * self.g_error).sum(-1, keepdim=True)
        products = grad * self.output
        linear = linear + self.over_value * products.abs().sum(-1, keepdim=True)
        square = (self.coefficients * self.g).square().sum(-1, keepdim=True)
        square = self.r**2 * (square + products.square().sum(-1, keepdim=True))
        self.delta = (self.factors * self.mean).sum(-1, keepdim=True)
        self.delta_error = Spread(linear, square)

    def _logits(self) -> None:
        r"""``dS`` and its errors, without those that a rounding of ``delta`` gives a whole row.

        :math:`dS_j = p_{j|s} (f_s g_j + \sum_i k_{si} x_i)` where the row's numbers :math:`x` are
        ``delta``, the mean over the segment and that over the documents. Then the same of a sink,
        where :math:`g` is 0, and the soft cap's factor.
        """
        problem, segments, factors = self.problem, self.segments, self.factors
        fixed = problem.document_mass is not None
        own = (self.scored & (problem.mode == "reweight")).expand_as(factors).clone()
        own[..., -1] &= fixed
        mass, mass_error = (x * (own & (not fixed)) for x in (self.mass, self.mass_error))
        of_delta = torch.where(own, mass, factors)
        # The documents' mean may also be taken from delta and the rest's.
        rest = self.mass[..., -1:] / self.mass[..., :-1].sum(-1, keepdim=True).clamp(min=1e-300)
        other = torch.where(own, -mass * rest, factors)
        # With a fixed mass the rest's mean may be made as delta is, a part of which it is.
        if fixed:
            other[..., -1:] = torch.where(own[..., -1:], 1.0, other[..., -1:])
        self.of_delta = (of_delta, other)
        numbers = (
            (torch.maximum(of_delta, other.abs()),
             torch.where(own, mass_error, self.factors_error), self.delta, self.delta_error),
            (mass, mass_error, self.documents, self.documents_error),
            (factors * own, self.factors_error * own, self.mean, self.mean_error),
        )  # fmt: skip
        offset = mass * self.documents - of_delta * self.delta - factors * own * self.mean
        self.logits = self.coefficients * self.g + self.within * segments.per_key(offset)
        self.apart = self._apart(own, offset)
        offsets = sum(k * x.abs() for k, _, x, _ in numbers)
        size = self.coefficients * self.g.abs() + self.within * segments.per_key(offsets)
        linear = sum(k * error.linear + d * x.abs() for k, d, x, error in numbers)
        # With a fixed mass the rest's mean may be what the documents' leave of delta.
        linear[..., -1:] += own[..., -1:] * self.delta_error.linear
        if problem.sinks is not None:
            self.sinks = self.sink * offset[..., -1]  # [B, Hq, M]
            of_sink = self.sink * linear[..., -1] + self.sink_error * offsets[..., -1]
            of_delta = torch.maximum(*(k[..., -1].square() for k in self.of_delta))
            of_delta = self.sink.square() * of_delta * self.delta_error.square[..., 0]
            self.sinks_error = Spread(of_sink + 2 * self.u * self.sink * offsets[..., -1], of_delta)
        linear = (
            self.coefficients_error * self.g.abs()
            + self.coefficients * self.g_error
            + self.within * segments.per_key(linear)
            + size * (self.within_error + 2 * self.u)
        )
        self.slope: Tensor | float = 1.0
        if segments.slope is not None:
            self.slope = segments.slope
            linear = self.slope * linear + self.slope_error * self.logits.abs()
            self.logits = self.logits * self.slope
        self.logits_error = Spread(linear, self._rounded(self.logits))

    def _apart(self, own: Tensor, offset: Tensor) -> Tensor:
        """The variance of ``dS`` if it is made of ``p`` and ``f p (g - c)``, rounded apart.

        So may the query's gradient of a document be, where ``c`` is the documents' mean, or with a
        fixed mass delta.
        """
        center = self.delta if self.problem.document_mass is not None else self.documents
        offset = torch.where(own, offset + self.factors * center, 0.0)[..., :-1]
        offset = self.segments.per_key(torch.nn.functional.pad(offset, (0, 1)))
        centered = self.coefficients * (self.g - center)
        slope = 1.0 if self.segments.slope is None else self.segments.slope
        square = self._rounded(slope * centered) + self._rounded(slope * self.within * offset)
        return torch.where(offset == 0, 0.0, square)

    def terms(self, heads: Tensor | float = 1.0, segments: Tensor | None = None) -> dict:
        """What some heads ``[Hq, 1, 1]`` and segments ``[S]`` add to output and gradients."""
        segments = torch.ones_like(self.mass[0, 0, 0]) if segments is None else segments
        share = heads * self.segments.per_key(segments.expand_as(self.mass))
        coefficients, logits = self.coefficients * share, self.logits * share
        result = {
            "output": coefficients @ self.value,
            "query": self.problem.scale * logits @ self.key,
            "scores": self._over_rows(self.scores * heads * segments[:-1]),
        }
        if self.problem.sinks is not None:
            of_row = self.sinks[..., None] * heads * segments[-1]
            result["sinks"] = of_row.sum((0, 2, 3))
        memory = {
            "key": self.problem.scale * logits.mT @ self.problem.query,
            "value": coefficients.mT @ self.grad,
        }
        for name, total in memory.items():
            result[f"prefix_{name}"], result[name] = self._memory(total)
        return result

    def deviations(self) -> dict[str, Tensor]:
        """The standard deviation that rounding may give each element of every result."""
        linear = self.coefficients_error + self.over_keys * self.coefficients
        square = self._rounded(self.coefficients)
        spreads = {
            "output": Spread(linear @ self.value.abs(), square @ self.value.square()),
            "query": self._of_query(),
            "scores": self.of_scores,
        }
        if self.problem.sinks is not None:
            count = self.sinks.shape[0] * self.sinks.shape[2]
            linear = self.sinks_error.linear + self._sum_of(count) * self.sinks.abs()
            spreads["sinks"] = Spread(linear.sum((0, 2)), self.sinks_error.square.sum((0, 2)))
        linear = self.coefficients_error + self.over_rows * self.coefficients
        value = Spread(linear.mT @ self.grad.abs(), square.mT @ self.grad.square())
        for name, spread in (("key", self._of_key()), ("value", value)):
            parts = (self._memory(x) for x in (spread.linear, spread.square))
            spreads[f"prefix_{name}"], spreads[name] = map(Spread, *parts)
        result = {}
        for name, exact in self.terms().items():
            stored = 0.0 if name in ("scores", "sinks") else self._rounded(exact)
            square = (ALIGNED * spreads[name].linear).square() + spreads[name].square + stored
            result[name] = square.sqrt()
        return {**result, "mass": ALIGNED * self.mass_error[..., :-1]}

    def _memory(self, per_head: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``[B, Hq, T, D]`` over what shares a key, and split the prefix from local keys."""
        problem = self.problem
        total = per_head.unflatten(1, (problem.key_heads, -1)).sum(2)
        prefix, local = total.tensor_split([problem.prefix_length], 2)
        if problem.prefix_key is not None and problem.prefix_key.shape[0] == 1:
            prefix = prefix.sum(0, keepdim=True)
        return prefix, local

    def _of_query(self) -> Spread:
        key, scale = self.key, abs(self.problem.scale)
        linear = self.logits_error.linear + self.over_keys * self.logits.abs()
        within = self.slope * self.within
        of_row = [(within * self.segments.per_key(k)) @ key for k in self.of_delta]
        of_row = torch.maximum(*(x.square() for x in of_row)) * self.delta_error.square
        square = torch.maximum(self.logits_error.square, self.apart) @ key.square() + of_row
        return Spread(scale * linear @ key.abs(), scale**2 * square)

    def _of_key(self) -> Spread:
        query, scale = self.problem.query, abs(self.problem.scale)
        linear = self.logits_error.linear + self.over_rows * self.logits.abs()
        of_row = torch.maximum(*(k.square() for k in self.of_delta)) * self.delta_error.square
        within = self.slope * self.within
        square = self.logits_error.square + within.square() * self.segments.per_key(of_row)
        return Spread(scale * linear.mT @ query.abs(), scale**2 * square.mT @ query.square())

    def _of_scores(self) -> Spread:
        """``f_d (mean_d - x)`` over rows, and heads, with ``x`` ``delta`` or the documents'."""
        x, error = self.documents, self.documents_error
        if self.problem.mode == "bias":
            x, error = self.delta, self.delta_error
        mean, mean_error = self.mean[..., :-1], self.mean_error
        factors, factors_error = (
            (y * self.scored)[..., :-1] for y in (self.factors, self.factors_error)
        )
        self.scores = factors * (mean - x)  # [B, Hq, M, C]
        linear = factors * (mean_error.linear[..., :-1] + error.linear)
        linear = linear + factors_error * (mean - x).abs()
        count = math.prod(mean.shape[d] for d in self.summed)
        linear = linear + (self._sum_of(count) + self.u) * factors * (mean.abs() + x.abs())
        square = factors.square() * (mean_error.square[..., :-1] + error.square)
        return Spread(*map(self._over_rows, (linear, square)))

    def _over_rows(self, of_row: Tensor) -> Tensor:
        """Sum ``[B, Hq, M, C]`` into the scores' shape."""
        return of_row.sum(self.summed).reshape(self.problem.scores.shape)
