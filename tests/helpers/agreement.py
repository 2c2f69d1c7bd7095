"""How results of an implementation are compared with the float64 oracle.

``rounding`` says how much each element may deviate. Of every result three things are checked:

- the largest error, in deviations of its element;
- the root mean square of all errors, in deviations;
- in 16-bit dtypes, whose rounding hides 1 % in a single element: how much of what a head, a
  segment or all of them add to the result is missing or too much. That is the slope of the errors
  over those terms, the least squares weighted by the deviations. Its own error is small where
  roundings are independent, and about one rounding where one is common to all terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dream_kernels.problem import Problem
from dream_kernels.reference import attend
from dream_kernels.validation import build_problem
from helpers.cases import GRADIENTS, Inputs
from helpers.rounding import Analysis

# Bound on the largest error. A million independent normal numbers reach 5.
LARGEST = 6.0
# Bounds on the root mean square over n vectors of a head (or n scores): rounding errors are common
# to many elements, so the few independent ones of a small tensor may all be large.
MEAN, MEAN_OF_FEW = 1.5, 3.0
# Bounds on a slope, in its standard deviations were errors independent; and in roundings. Errors
# within a vector are common, and so are, over all rows, those of a document's only probability, to
# which those of the other documents add where their values point the same way.
SLOPE, SLOPE_OF_SCORES = 12.0, 5.0
ROUNDINGS, ROUNDINGS_OF_DOCUMENT = 1.5, 2.0
# The slopes of at most this many documents are checked.
DOCUMENTS = 8


def formulas(query, key, value, scores, spans, **options):
    """The forward formulas without the hand-written backward: autograd differentiates them."""
    return attend(problem_of(query, key, value, scores, spans, **options))


def problem_of(query, key, value, scores, spans, **options) -> Problem:
    options = {"heads": None, "document_mass": None, "mode": "reweight", **options}
    return build_problem(query, key, value, scores, spans, **options)


class Oracle:
    """The exact results of one call, and how far an implementation's may be from them.

    Args:
        problem: in float64, with the numbers that the implementation gets.
        grad_output: as ``problem``.
        exact: output and gradients by name; None for a gradient that nobody asked for.
        dtype: of the call.
    """

    def __init__(
        self,
        problem: Problem,
        grad_output: Tensor,
        exact: Mapping[str, Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        wanted = [name for name in GRADIENTS if exact.get(name) is not None]
        self.exact, self.dtype = exact, dtype
        # The only gradient that may be computed from what forward kept of each document.
        self.analysis = Analysis(problem, grad_output, dtype, kept_outputs=wanted == ["scores"])
        self.deviations = self.analysis.deviations()
        self._terms: list[tuple[str, dict[str, Tensor]]] | None = None

    @classmethod
    def of(cls, inputs: Inputs, names: tuple[str, ...] = GRADIENTS) -> Oracle:
        """The oracle of a call in the dtype of ``inputs``, with the gradients of ``names``."""
        exact = inputs.cast(torch.float64).require_grad(names)
        results = exact.run(formulas)
        with torch.no_grad():
            problem = exact.call(problem_of)
            dtype = inputs.tensors["query"].dtype
            return cls(problem, exact.grad_output, results, dtype)

    def check(self, actual: Mapping[str, Tensor | None]) -> None:
        """Raise AssertionError where a result is off by more than its roundings explain."""
        assert self.exact.keys() <= actual.keys(), f"missing: {self.exact.keys() - actual.keys()}"
        for name, result in actual.items():
            if name != "mass" and self.exact[name] is None:
                assert result is None, f"{name}: a gradient that nobody asked for"
                continue
            assert result is not None, f"{name}: the gradient is lost"
            assert torch.isfinite(result).all(), f"{name} is not finite"
            complaint = self.complaint(name, result) if result.numel() else None
            assert complaint is None, f"{complaint} (see tests/helpers/agreement.py)"

    def complaint(self, name: str, actual: Tensor) -> str | None:
        """What is wrong with a result, or None; ``"mass"`` is that of every document."""
        exact = self.analysis.mass[..., :-1] if name == "mass" else self.exact[name]
        assert exact is not None
        deviation = self.deviations[name].reshape(exact.shape)
        error = actual.double() - exact
        scaled = torch.where(error == 0, 0.0, error / deviation)
        at = int(scaled.abs().argmax())
        largest = scaled.flatten()[at].abs().item()
        if not largest <= LARGEST:
            where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), exact.shape))
            return (
                f"{name}{list(where)} is off by {error.flatten()[at].item():.3g} from "
                f"{exact.flatten()[at].item():.3g}: {largest:.1f} deviations of its rounding "
                f"errors, of {deviation.flatten()[at].item():.2g} each; {LARGEST:g} are allowed"
            )
        mean = scaled.square().mean().sqrt().item()
        vectors = exact.numel() if name in ("scores", "sinks", "mass") else exact[..., 0].numel()
        allowed = MEAN + MEAN_OF_FEW / math.sqrt(vectors)
        if not mean <= allowed:
            return (
                f"{name} is off by {error.square().mean().sqrt().item():.3g} in the root mean "
                f"square: {mean:.2f} deviations of its rounding errors; {allowed:.2f} are allowed"
            )
        if self.dtype not in (torch.float16, torch.bfloat16) or name == "mass":
            return None
        for what, terms in self.terms():
            slope, allowed = self.slope(name, terms[name].reshape(exact.shape), error)
            roundings = ROUNDINGS_OF_DOCUMENT if what.startswith("document") else ROUNDINGS
            allowed = max(allowed, roundings * torch.finfo(self.dtype).eps / 2)
            if not abs(slope) <= allowed:
                return (
                    f"{name}: what {what} adds to it is {slope:+.2%} too large; "
                    f"its rounding errors explain {allowed:.2%}"
                )
        return None

    def slope(self, name: str, term: Tensor, error: Tensor) -> tuple[float, float]:
        """How much of a term is in the errors, and how much independent errors may explain."""
        deviation = self.deviations[name].reshape(term.shape)
        term = torch.where(term == 0, 0.0, term / deviation)
        size = term.norm().item()
        if size == 0:
            return 0.0, 0.0
        error = torch.where(term == 0, 0.0, error / deviation)
        independent = SLOPE_OF_SCORES if name in ("scores", "sinks") else SLOPE
        return (error * term).sum().item() / size**2, independent / size

    def terms(self) -> list[tuple[str, dict[str, Tensor]]]:
        """What everything, each head, and the rest and some documents add to every result."""
        if self._terms is None:
            self._terms = list(self._find_terms())
        return self._terms

    def _find_terms(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        problem, analysis = self.analysis.problem, self.analysis
        yield "everything", analysis.terms()
        for h, head in enumerate(torch.eye(problem.query_heads, device=problem.query.device)):
            yield f"head {h}", analysis.terms(heads=head.double()[:, None, None])
        segments = torch.eye(problem.documents + 1, device=problem.query.device).double()
        for d in range(0, problem.documents, math.ceil(problem.documents / DOCUMENTS)):
            yield f"document {d}", analysis.terms(segments=segments[d])
        yield "the rest", analysis.terms(segments=segments[-1])
