"""Correctness check before timing: outputs and gradients against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dream_kernels import document_attention

from .adapters import Adapter, Prepared, Refusal
from .adapters.eager import Eager
from .cases import DTYPES, Case, Inputs

# Bytes of the float64 oracle of a case; larger cases are checked on fewer batch elements.
_ORACLE_BYTES = 4 * 2**30
_ORACLE_MATRICES = 10
# What all elements have in common may be off by one and a half roundings (half an eps each) of a
# number that they share, or by what is left of independent errors of all vectors of a head.
_ROUNDINGS, _DEVIATIONS, _DEVIATIONS_OF_SCORES = 0.75, 2.0, 3.0
# Sixteen-bit results are rounded once, from sums in float32. In float32 the sums themselves round.
_FLOORS = {"float32": 8 * torch.finfo(torch.float32).eps} | {
    name: torch.finfo(DTYPES[name]).eps for name in ("bfloat16", "float16")
}


def check_case(case: Case) -> Case:
    """The case with as many batch elements as the oracle can hold, at least one."""
    one = _ORACLE_MATRICES * 8 * case.query_heads * case.rows * case.length
    return replace(case, batch=max(1, min(case.batch, _ORACLE_BYTES // one)))


@dataclass
class Oracle:
    """The correct result of one case, and how much plain PyTorch in the same dtype deviates.

    A peer's error may be twice plain PyTorch's plus a few roundings of the dtype, in the norm of
    the output and of every gradient. Roundings have either sign: of the part of the error that is
    a multiple of what is expected, 1 % in one coefficient say, less is allowed.
    """

    inputs: Inputs

    def __post_init__(self) -> None:
        self._expected: dict[str, dict[str, Tensor]] = {}
        self._allowed: dict[str, dict[str, float]] = {}

    def complaint(self, adapter: Adapter, prepared: Prepared) -> str | None:
        """Return what is wrong with a peer, or None."""
        kind = adapter.computes(self.inputs.case)
        expected, allowed = self._expect(kind)
        for name, actual in run(prepared).items():
            if name not in expected:
                continue
            error = relative_error(actual, expected[name])
            what = name if name == "output" else f"gradient of {name}"
            if not error <= allowed[name]:  # NaN is wrong too
                return f"{what} is off by {error:.1e}, {allowed[name]:.1e} is allowed"
            multiple = common_error(actual, expected[name])
            most = self._most_in_common(name, actual, allowed[name])
            if not abs(multiple) <= most:
                return f"{what} is {multiple:+.2%} too large, roundings explain {most:.2%}"
        return None

    def _most_in_common(self, name: str, actual: Tensor, allowed: float) -> float:
        roundings = _ROUNDINGS * torch.finfo(DTYPES[self.inputs.case.dtype]).eps
        if name == "scores":
            return max(roundings, _DEVIATIONS_OF_SCORES * allowed / math.sqrt(actual.numel()))
        return max(roundings, _DEVIATIONS * allowed / math.sqrt(max(1, actual[..., 0].numel())))

    def _expect(self, kind: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        if kind not in self._expected:
            exact = self.inputs.exact()
            case = replace(self.inputs.case, gradients=("query", "key", "value", "scores"))
            # A kernel without scores takes no mask either.
            change = {"scored": 0.0, "padding": 0} if kind == "plain" else {"mode": kind}
            case = replace(case, **change)
            expected = _reference(replace(exact, case=case))
            yardstick = Eager().setup(replace(self.inputs, case=case))
            assert isinstance(yardstick, Prepared)
            floors = dict.fromkeys(expected, _FLOORS[case.dtype])
            floors["scores"] += _rounding_of_scores(expected, exact.grad_output)
            self._allowed[kind] = {
                name: 2 * relative_error(value, expected[name]) + floors[name]
                for name, value in run(yardstick).items()
            }
            self._expected[kind] = expected
        return self._expected[kind], self._allowed[kind]


def run(prepared: Prepared) -> dict[str, Tensor]:
    """Output and gradients of a peer, by name."""
    if prepared.backward is None:
        with torch.no_grad():
            return {"output": prepared.forward()}
    output = prepared.forward()
    return {"output": output.detach(), **prepared.backward(output)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; 0 where both vanish."""
    expected = expected.double()
    difference = (actual.double() - expected).norm()
    size = expected.norm()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return (difference / size).item()


def common_error(actual: Tensor, expected: Tensor) -> float:
    """The multiple of ``expected`` that is nearest to the error; 0 where ``expected`` vanishes."""
    expected = expected.double()
    size = expected.square().sum()
    if size == 0:
        return 0.0
    return (((actual.double() - expected) * expected).sum() / size).item()


def _rounding_of_scores(expected: dict[str, Tensor], grad_output: Tensor) -> float:
    """One float32 rounding of the terms of the scores' gradient, relative to that gradient.

    It is a sum over rows of differences of ``dO . o``, in which large terms nearly cancel.
    """
    terms = (expected["output"] * grad_output).abs().sum(-1).norm().item()
    size = expected["scores"].norm().item()
    return torch.finfo(torch.float32).eps * terms / size if size else 0.0


def _reference(inputs: Inputs) -> dict[str, Tensor]:
    case = inputs.case
    leaves = [
        t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value, inputs.scores)
    ]
    query, key, value, scores = leaves
    output = document_attention(
        query, key, value, scores, inputs.spans, mode=case.mode, heads=case.heads,
        attention_mask=inputs.attention_mask(), prefix=inputs.prefix, impl="reference",
    )  # fmt: skip
    gradients = torch.autograd.grad(output, leaves, inputs.grad_output)
    return {
        "output": output.detach(),
        **dict(zip(("query", "key", "value", "scores"), gradients)),
    }


def prepare(adapter: Adapter, inputs: Inputs, available: int) -> Prepared | Refusal:
    """Set up a peer, unless it would need more than ``available`` bytes."""
    needed = adapter.working_bytes(inputs.case)
    if needed > available:
        return Refusal(
            f"would need about {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} are free"
        )
    return adapter.setup(inputs)
