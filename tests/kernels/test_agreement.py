"""An error of 1 % in one coefficient fails the check of agreement, in every case and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dream_kernels import document_attention, reference
from helpers.agreement import SLOPE, SLOPE_OF_SCORES, Oracle
from helpers.cases import BASE_CASES, CASES, OPTION_CASES, Case, make_inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WRONG = 0.01
COEFFICIENTS = ("scale", "document_mass", "weight of a document")

# Every case in every dtype, each in another of its modes; with options, in one of the dtypes.
grid = pytest.mark.parametrize(
    "case,dtype",
    [
        pytest.param(CASES[4 * i + (i + j) % 4], dtype, id=f"{CASES[4 * i + (i + j) % 4]}-{dtype}")
        for j, dtype in enumerate(DTYPES)
        for i in range(len(BASE_CASES))
    ]
    + [
        pytest.param(case, DTYPES[i // 3 % 3], id=f"{case}-{DTYPES[i // 3 % 3]}")
        for i, case in enumerate(OPTION_CASES)
    ],
)


def stored(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    return exact.to(torch.float32 if name in ("scores", "sinks") else dtype)


def hidden(oracle: Oracle, name: str, term: Tensor) -> bool:
    """Whether an error in a term is less than twice what its independent roundings explain.

    In 16 bits they hide it in what a document of little weight adds to the output, for example; the
    gradients of that document's own values then show it.
    """
    size = (term / oracle.deviations[name].reshape(term.shape)).nan_to_num().norm().item()
    return WRONG * size < 2 * (SLOPE_OF_SCORES if name in ("scores", "sinks") else SLOPE)


@grid
def test_results_that_are_right_but_for_one_term(case: Case, dtype: torch.dtype) -> None:
    """The term is what everything, one head or one document adds to one result."""
    oracle = Oracle.of(make_inputs(case, dtype))
    oracle.check({name: stored(name, exact, dtype) for name, exact in oracle.exact.items()})
    for what, terms in oracle.terms():
        found = []
        for name, exact in oracle.exact.items():
            term = terms[name].reshape(exact.shape)
            if not exact.numel() or term.abs().max() <= 1e-9 * exact.abs().max():
                continue
            wrong = stored(name, exact + WRONG * term, dtype)
            found.append(oracle.complaint(name, wrong) is not None)
            # The gradient in a sink is one number for each head, and may nearly cancel.
            may_hide = (dtype != torch.float32 or name == "sinks") and hidden(oracle, name, term)
            assert found[-1] or may_hide, f"1 % of what {what} adds to {name}"
        assert any(found) or not found, f"1 % of what {what} adds to any result"


@pytest.mark.parametrize(
    "case,coefficient,dtype",
    [
        pytest.param(case, coefficient, DTYPES[(i + j) % 3], id=f"{case}-{coefficient}")
        for i, case in enumerate(BASE_CASES)
        for j, coefficient in enumerate(COEFFICIENTS)
        if coefficient == "scale" or case.name != "no_head_scored"
        # whose mass is 1, regardless of what was asked for
        if coefficient != "document_mass" or case.name != "no_key_outside_documents"
    ],
)
def test_formulas_that_are_right_but_for_one_coefficient(
    case: Case, coefficient: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if coefficient == "document_mass":
        case = replace(case, document_mass=0.6)
    inputs = make_inputs(case, dtype)
    oracle = Oracle.of(inputs)
    options = {
        "scale": {"scale": (case.scale or case.head_dim**-0.5) * (1 + WRONG)},
        "document_mass": {"document_mass": 0.6 * (1 + WRONG)},
    }.get(coefficient, {})
    if coefficient == "weight of a document":
        right = reference.document_weights

        def wrong(problem) -> Tensor:
            weights = right(problem)
            return torch.where(weights == weights.amax(), weights * (1 + WRONG), weights)

        monkeypatch.setattr(reference, "document_weights", wrong)
    actual = inputs.require_grad().run(document_attention, impl="reference", **options)
    with pytest.raises(AssertionError, match=r"are allowed|rounding errors explain"):
        oracle.check(actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ("softcap", "sinks", "window"))
def test_options_that_are_right_but_for_a_little(option: str, dtype: torch.dtype) -> None:
    """1 % in the cap, or in what a sink adds to the normaliser; a window that is 1 too long."""
    case = Case("little", rows=12, heads=(0, 2, 3), softcap=1.5, sinks=True, window="tight")
    inputs = make_inputs(case, dtype)
    oracle = Oracle.of(inputs)
    inputs.require_grad()
    if option == "sinks":
        inputs.tensors["sinks"].data += WRONG
    else:
        inputs.options[option] *= 1 + WRONG if option == "softcap" else 1
        inputs.options[option] += option == "window"
    with pytest.raises(AssertionError, match=r"are allowed|rounding errors explain"):
        oracle.check(inputs.run(document_attention, impl="reference"))
