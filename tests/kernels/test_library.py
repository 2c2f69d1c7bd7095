"""The operator under ``torch.compile`` and ``torch.library``'s own checks."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from dream_kernels import document_attention, document_mass, library
from dream_kernels.dispatch import IMPLEMENTATIONS
from dream_kernels.problem import Needs
from dream_kernels.validation import build_problem
from helpers.cases import GRADIENTS, Case, Inputs, make_inputs

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
IMPLS = ("reference", "cpu")
CASES = [
    Case("prefix", prefix=19, local=8, padding=("left",)),
    Case("no_prefix-bias", mode="bias", heads=(1, 4)),
    Case("mass-scores_per_head", document_mass=0.6, per_head_scores=True, prefix=19, local=8),
]
WITH_OPTIONS = Case(
    "options", window="tight", positions=True, softcap=1.5, sinks=True, prefix=19, local=8
)
NEEDS = (GRADIENTS, ("scores",), ("query", "scores"))

impl_grid = pytest.mark.parametrize("impl", IMPLS)


def compiled(backend: str = "aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(document_attention, fullgraph=True, backend=backend, **options)


def assert_equal_results(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, f"{name}: a gradient that nobody asked for"
        else:
            torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


@impl_grid
@pytest.mark.parametrize("names", NEEDS, ids="+".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_call_equals_the_eager_one(case: Case, names: tuple, impl: str) -> None:
    inputs = make_inputs(case, torch.float32).require_grad(names)
    expected = inputs.run(document_attention, impl=impl)
    assert_equal_results(inputs.run(compiled(), impl=impl), expected)


@pytest.mark.parametrize("value_dim", (None, 8))
def test_a_compiled_call_takes_every_option(value_dim: int | None) -> None:
    inputs = make_inputs(replace(WITH_OPTIONS, value_dim=value_dim), torch.float32).require_grad()
    expected = inputs.run(document_attention)
    assert expected["sinks"] is not None
    assert_equal_results(inputs.run(compiled()), expected)


@needs_triton
def test_triton_passes_the_same_checks() -> None:
    """In the interpreter if there is no GPU, and so on the smallest possible call."""
    case = Case("triton", batch=1, query_heads=2, key_heads=1, rows=2, local=6, spans=((0, 3),))
    inputs = make_inputs(case, torch.float32).require_grad(("query", "scores"))
    expected = inputs.run(document_attention, impl="triton")
    assert_equal_results(inputs.run(compiled(), impl="triton"), expected)
    check_operators(inputs, "triton")


def test_cuda_passes_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its emulator; with other lengths in the same graph."""
    monkeypatch.setenv("DREAM_KERNELS_CUDA_EMULATE", "1")
    case = Case(
        "cuda", batch=1, query_heads=2, key_heads=1, rows=2, local=6, spans=((0, 3),), head_dim=64
    )
    inputs = make_inputs(case, torch.bfloat16).require_grad(("query", "scores"))
    check_operators(inputs, "cuda")
    function = compiled(dynamic=True)
    for local in (6, 9):
        inputs = make_inputs(replace(case, local=local), torch.bfloat16).require_grad()
        expected = inputs.run(document_attention, impl="cuda")
        assert_equal_results(inputs.run(function, impl="cuda"), expected)


def test_inductor_compiles_the_code_around_it() -> None:
    inputs = make_inputs(CASES[0], torch.float32).require_grad()

    def model(query, key, value, scores, spans, **options):
        output = document_attention(query * 2, key, value, scores / 0.5, spans, **options)
        return output.transpose(1, 2).flatten(2).relu()

    inputs.grad_output = torch.ones(())

    def total(*arguments, **options):
        return model(*arguments, **options).sum()

    expected = inputs.run(total)
    torch._dynamo.reset()
    actual = inputs.run(torch.compile(total, fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_other_lengths_need_no_other_graph() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(document_attention, fullgraph=True, backend=counter, dynamic=True)
    for local in (24, 31, 40):
        case = Case("lengths", local=local, rows=local // 2)
        inputs = make_inputs(case, torch.float32).require_grad()
        expected = inputs.run(document_attention, impl="cpu")
        assert_equal_results(inputs.run(function, impl="cpu"), expected)
    assert counter.frame_count == 1


def test_autocast_inside_a_compiled_function() -> None:
    inputs = make_inputs(CASES[0], torch.float32).require_grad()

    def function(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return document_attention(*arguments, **options)

    inputs.grad_output = inputs.grad_output.bfloat16()
    expected = inputs.run(function)
    assert expected["output"].dtype == torch.bfloat16
    torch._dynamo.reset()
    actual = inputs.run(torch.compile(function, fullgraph=True, backend="aot_eager"))
    assert_equal_results(actual, expected)


def test_values_are_checked_when_a_compiled_function_runs() -> None:
    inputs = make_inputs(Case("values"), torch.float32)
    function = compiled()
    inputs.call(function)
    bad = replace(inputs, spans=inputs.spans + 20)
    with pytest.raises(ValueError, match="spans must satisfy 0 <= start <= end <= 24"):
        bad.call(function)
    inputs.tensors["scores"][0, 1] = torch.nan
    with pytest.raises(ValueError, match="scores must not be NaN"):
        inputs.call(function)


def test_document_mass_compiles() -> None:
    inputs = make_inputs(CASES[0], torch.float32)
    t = inputs.tensors

    def masses(query, key, prefix):
        return document_mass(query, key, inputs.spans, prefix=prefix)

    expected = masses(t["query"], t["key"], t["prefix_key"])
    torch._dynamo.reset()
    function = torch.compile(masses, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(t["query"], t["key"], t["prefix_key"]), expected)


def check_operators(inputs: Inputs, impl: str) -> None:
    """Run ``torch.library.opcheck`` on the three operators."""
    t = inputs.tensors
    prefix = (t["prefix_key"], t["prefix_value"]) if "prefix_key" in t else None
    problem = build_problem(
        t["query"], t["key"], t["value"], t["scores"], inputs.spans,
        prefix=prefix, sinks=t.get("sinks"), **inputs.options,
    )  # fmt: skip
    # The scores of a problem are a view: opcheck wants leaves.
    scores = problem.scores.detach().requires_grad_(t["scores"].requires_grad)
    problem = replace(problem, scores=scores)
    needs = Needs(*(x is not None and x.requires_grad for x in problem.tensors))
    arguments = library._flatten(problem, impl)
    ops = torch.ops.dream_kernels
    torch.library.opcheck(ops.attend.default, (*arguments, list(needs)))
    torch.library.opcheck(ops.document_mass.default, arguments)
    with torch.no_grad():
        output, saved = IMPLEMENTATIONS[impl].forward(problem, needs)
    flat = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(
        ops.attend_backward.default,
        (*flat, list(needs), output, list(saved), inputs.grad_output),
    )


def _opchecks() -> list:
    """Every case with each subset of gradients on one implementation; the others are slow."""
    return [
        pytest.param(
            case, names, impl, id=f"{case}-{'+'.join(names)}-{impl}",
            marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow,
        )
        for i, case in enumerate(CASES)
        for j, names in enumerate(NEEDS)
        for k, impl in enumerate(IMPLS)
    ]  # fmt: skip


@pytest.mark.parametrize("case,names,impl", _opchecks())
def test_opcheck(case: Case, names: tuple, impl: str) -> None:
    check_operators(make_inputs(case, torch.float32).require_grad(names), impl)


def test_opcheck_with_every_option() -> None:
    check_operators(make_inputs(WITH_OPTIONS, torch.float32).require_grad(), "reference")
