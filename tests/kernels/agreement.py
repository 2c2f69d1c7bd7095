"""How results of an implementation are held against the float64 oracle."""

from __future__ import annotations

import math

import torch

from cases import Inputs
from dream_kernels.reference import attend
from dream_kernels.validation import build_problem


def formulas(query, key, value, scores, spans, **options):
    """The forward formulas without the hand-written backward: autograd differentiates them."""
    options = {"heads": None, "document_mass": None, "mode": "reweight", **options}
    return attend(build_problem(query, key, value, scores, spans, **options))


def largest_errors(actual: dict, oracle: dict) -> dict[str, float]:
    """The largest error of each result that the oracle has elements of."""
    return {
        name: (actual[name].double() - expected).abs().max().item()
        for name, expected in oracle.items()
        if expected is not None and expected.numel()
    }


def assert_as_good_as_plain_pytorch(
    inputs: Inputs,
    actual: dict,
    oracle: dict,
    plain: dict,
    dtype: torch.dtype,
    floors: dict[str, float] | None = None,
) -> None:
    """The error against the oracle is at most twice plain PyTorch's, plus a rounding floor.

    ``floors`` raises the floor of the results that it names.
    """
    errors = largest_errors(plain, oracle)
    assert_errors_at_most_twice(inputs, actual, oracle, errors, dtype, floors)


def assert_errors_at_most_twice(
    inputs: Inputs,
    actual: dict,
    oracle: dict,
    plain_errors: dict[str, float],
    dtype: torch.dtype,
    floors: dict[str, float] | None = None,
) -> None:
    for name, expected in oracle.items():
        if expected is None:
            assert actual[name] is None, f"{name}: a gradient that nobody asked for"
            continue
        result = actual[name]
        assert result is not None, f"{name}: the gradient is lost"
        assert torch.isfinite(result).all(), f"{name} is not finite"
        if result.numel() == 0:
            continue
        error = (result.double() - expected).abs().max().item()
        plain_error = plain_errors[name]
        # One rounding of the largest element to the dtype of the inputs. The scores' gradient is a
        # sum over rows and heads that nearly cancels; the roundings of n summands add up like
        # the square root of n.
        size = max(expected.abs().max().item(), 1e-3)
        floor = size * torch.finfo(dtype).eps
        if name == "scores":
            floor *= math.prod(inputs.tensors["query"].shape[1:3]) ** 0.5
        floor = max(floor, (floors or {}).get(name, 0.0))
        assert error <= 2 * plain_error + floor, (
            f"{name}: {error:.3g} against {plain_error:.3g} and a floor of {floor:.3g}"
        )
