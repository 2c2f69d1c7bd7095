"""Every implementation against the float64 reference, over the mandatory cases."""

from __future__ import annotations

import itertools

import pytest
import torch

import dream_kernels
from dream_kernels import document_attention
from dream_kernels.api import document_mass
from helpers.agreement import Oracle, formulas
from helpers.cases import (
    BASE_CASES,
    CASES,
    GRADIENTS,
    OPTION_CASES,
    Case,
    Inputs,
    make_inputs,
)

IMPLS = ("reference", "cpu")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

case_grid = pytest.mark.parametrize("case", [*CASES, *OPTION_CASES], ids=str)


@case_grid
def test_closed_form_equals_autograd_in_float64(case: Case) -> None:
    inputs = make_inputs(case).require_grad()
    expected = inputs.run(formulas)
    actual = inputs.run(document_attention, impl="reference")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12, msg=name)


def _crossed_in_turn() -> list:
    """Cases in every dtype; those that cross a mandatory one with all options in two of three."""
    cases = [*CASES, *OPTION_CASES]
    plain = len(cases) - 3 * len(BASE_CASES)
    return [
        pytest.param(
            case, dtype, id=f"{case}-{dtype}",
            marks=pytest.mark.slow if i >= plain and (i + j) % 3 == 0 else (),
        )
        for i, case in enumerate(cases)
        for j, dtype in enumerate(CPU_DTYPES)
    ]  # fmt: skip


@pytest.mark.parametrize("case,dtype", _crossed_in_turn())
def test_cpu_agrees_with_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    actual = inputs.require_grad().run(document_attention, impl="cpu")
    Oracle.of(inputs).check(actual)


def _one_dtype_each() -> list:
    """Every case with each dtype in turn; the others are slow."""
    return [
        pytest.param(
            case, dtype, id=f"{case}-{dtype}", marks=() if (i + j) % 3 == 0 else pytest.mark.slow
        )
        for i, case in enumerate([*CASES, *OPTION_CASES])
        for j, dtype in enumerate(CPU_DTYPES)
    ]


@pytest.mark.parametrize("case,dtype", _one_dtype_each())
def test_gradient_of_scores_has_the_oracles_direction_and_size(
    case: Case, dtype: torch.dtype
) -> None:
    inputs = make_inputs(case, dtype)
    actual = inputs.require_grad(("scores",)).run(document_attention, impl="cpu")
    Oracle.of(inputs, ("scores",)).check(actual)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_only_scores_gradient_equals_the_full_one(impl: str, mode: str) -> None:
    """The silent loss of exactly this gradient is why the library exists."""
    case = Case("only_scores", mode=mode, prefix=19, local=8, padding=("left",))
    inputs = make_inputs(case, torch.float32)
    only = inputs.require_grad(("scores",)).run(document_attention, impl=impl)
    assert only["scores"] is not None and only["scores"].abs().max() > 1e-3
    Oracle.of(inputs, ("scores",)).check(only)
    full = inputs.require_grad().run(document_attention, impl=impl)
    Oracle.of(inputs).check(full)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", range(1, len(GRADIENTS)))
def test_every_subset_of_gradients(impl: str, size: int) -> None:
    inputs = make_inputs(
        Case("subset", prefix=19, local=8, softcap=1.5, sinks=True, window="tight"),
        torch.float32,
    )
    oracle = Oracle.of(inputs)
    for names in itertools.combinations(GRADIENTS, size):
        part = inputs.require_grad(names).run(document_attention, impl=impl)
        for name in GRADIENTS:
            if name in names:
                assert oracle.complaint(name, part[name]) is None
            else:
                assert part[name] is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_two_runs_are_bit_equal(impl: str, dtype: torch.dtype) -> None:
    case = Case("twice", rows=37, prefix=131, local=37, head_dim=64, batch=3)
    inputs = make_inputs(case, dtype).require_grad()
    first, second = (inputs.run(document_attention, impl=impl) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("mode,mass", (("reweight", None), ("reweight", 0.6), ("bias", None)))
def test_gradcheck(mode: str, mass: float | None) -> None:
    case = Case(
        "gradcheck", spans=((1, 3), (3, 6)), batch=2, query_heads=2, key_heads=1, rows=3,
        local=5, prefix=4, head_dim=3, mode=mode, document_mass=mass,
        padding=("right",), per_head_scores=True,
    )  # fmt: skip
    inputs = make_inputs(case).require_grad()
    names = list(inputs.tensors)

    def function(*tensors):
        return Inputs(dict(zip(names, tensors)), inputs.spans, inputs.options).call(
            document_attention, impl="reference"
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.tensors.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode,mass", (("reweight", None), ("reweight", 1.0), ("bias", None)))
def test_score_spread_of_1e4_and_vanishing_mass_stay_finite(impl, mode, mass) -> None:
    inputs = make_inputs(Case("spread", mode=mode, document_mass=mass), torch.float32)
    inputs.tensors["scores"] = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, 1e4]])
    # Logits 300 apart: the mass of the second document underflows to zero in float32.
    inputs.tensors["key"][:, :, 7:12] = -40 * inputs.tensors["query"][:, ::3, :1].sign()
    inputs.tensors["key"][:, :, 2:7] *= 40
    inputs.require_grad()
    for name, value in inputs.run(document_attention, impl=impl).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_takes_all_weight_from_a_document(impl: str) -> None:
    inputs = make_inputs(Case("minus_infinity"), torch.float32)
    inputs.tensors["scores"][:, 1] = -torch.inf
    inputs.require_grad()
    result = inputs.run(document_attention, impl=impl)
    assert all(torch.isfinite(value).all() for value in result.values())
    assert (result["scores"][:, 1] == 0).all()
    inputs.tensors["value"].data[:, :, 7:12] = 1e3
    assert torch.allclose(inputs.run(document_attention, impl=impl)["output"], result["output"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_minus_infinity_everywhere_leaves_no_document_with_weight(impl: str, mode: str) -> None:
    inputs = make_inputs(Case("all_minus_infinity", mode=mode), torch.float32)
    inputs.tensors["scores"][0] = -torch.inf
    result = inputs.require_grad().run(document_attention, impl=impl)
    assert all(torch.isfinite(value).all() for value in result.values())
    inputs.tensors["value"].data[:, :, 2:12] = 1e3
    changed = inputs.run(document_attention, impl=impl)["output"]
    assert torch.equal(changed[0], result["output"][0])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_sees_no_key_gives_zero_and_no_gradient(impl: str) -> None:
    case = Case("blind", rows=26, padding=("left",))
    inputs = make_inputs(case, torch.float32).require_grad()
    result = inputs.run(document_attention, impl=impl)
    assert (result["output"][:, :, :2] == 0).all()
    assert (result["query"][:, :, :2] == 0).all()
    assert (result["query"][0, :, :5] == 0).all()


def test_uniform_scores_over_equal_masses_change_nothing() -> None:
    """With the reader's own mass, scores equal to the log masses reproduce plain attention."""
    inputs = make_inputs(Case("identity", query_heads=1, key_heads=1, rows=1))
    plain = inputs.call(document_attention, heads=(), impl="reference")
    t = inputs.tensors
    mass = document_mass(t["query"], t["key"], inputs.spans, impl="reference")
    t["scores"] = mass[:, 0, 0].log()
    torch.testing.assert_close(inputs.call(document_attention, impl="reference"), plain)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", BASE_CASES, ids=str)
def test_document_mass_is_the_sum_of_attention_probabilities(impl: str, case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    t = inputs.cast(torch.float64).tensors
    b, hq, m, _ = t["query"].shape
    key = t["key"]
    if case.prefix:
        key = torch.cat([t["prefix_key"].expand(b, -1, -1, -1), key], 2)
    key = key.repeat_interleave(hq // case.key_heads, 1)
    scale = case.scale or case.head_dim**-0.5
    logits = scale * t["query"] @ key.transpose(-1, -2)
    total = key.shape[2]
    blind = torch.zeros(b, 1, m, total, dtype=torch.bool)
    if case.causal:
        blind |= torch.arange(total) > torch.arange(total - m, total)[:, None]
    if inputs.options["attention_mask"] is not None:
        blind |= inputs.options["attention_mask"][:, None, None] == 0
    p = torch.softmax(logits.masked_fill(blind, -torch.inf), -1).nan_to_num(0.0)
    expected = torch.zeros(b, hq, m, inputs.spans.shape[1], dtype=torch.float64)
    for row, spans in enumerate(inputs.spans.tolist()):
        for c, (start, end) in enumerate(spans):
            expected[row, :, :, c] = p[row, :, :, start:end].sum(-1)
    t32 = inputs.tensors
    actual = document_mass(
        t32["query"], t32["key"], inputs.spans, scale=case.scale, causal=case.causal,
        attention_mask=inputs.options["attention_mask"], prefix=t32.get("prefix_key"), impl=impl,
    )  # fmt: skip
    oracle = Oracle.of(inputs, ())
    torch.testing.assert_close(oracle.analysis.mass[..., :-1], expected, rtol=1e-10, atol=1e-12)
    assert oracle.complaint("mass", actual) is None


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_of_any_strides(impl: str) -> None:
    inputs = make_inputs(Case("strides", prefix=19, local=8), torch.float32)
    for name, tensor in inputs.tensors.items():
        if name != "scores":  # [B, T, H, D] in memory, as models produce it, and every other D
            spread = torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], -1)
            strided = spread.transpose(1, 2).contiguous().transpose(1, 2)[..., 0]
            assert not strided.is_contiguous() and strided.stride(-1) == 2
            inputs.tensors[name] = strided.detach()
    inputs.grad_output = inputs.grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    Oracle.of(inputs).check(inputs.require_grad().run(document_attention, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_gradient_of_a_sum(impl: str) -> None:
    """``output.sum().backward()`` hands the backward a gradient with zero strides."""
    inputs = make_inputs(Case("sum"), torch.float32).require_grad()
    inputs.grad_output = torch.ones(()).expand_as(inputs.grad_output)
    actual = inputs.run(document_attention, impl=impl)
    Oracle.of(inputs).check(actual)


def test_double_backward_is_refused() -> None:
    inputs = make_inputs(Case("double")).require_grad()
    output = inputs.call(document_attention, impl="reference")
    (grad,) = torch.autograd.grad(output.sum(), inputs.tensors["scores"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_double_backward_is_refused_when_only_scores_need_grad() -> None:
    inputs = make_inputs(Case("double")).require_grad(("scores",))
    output = inputs.call(document_attention, impl="reference")
    (grad,) = torch.autograd.grad(output.sum(), inputs.tensors["scores"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_inputs(impl: str) -> None:
    inputs = make_inputs(Case("autocast", prefix=19, local=8), torch.float32).require_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = inputs.call(document_attention, impl=impl)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in inputs.tensors.values())
    assert Oracle.of(inputs.cast(torch.bfloat16), ()).complaint("output", output) is None


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_records_nothing(impl: str) -> None:
    inputs = make_inputs(Case("no_grad"), torch.float32).require_grad()
    with torch.no_grad():
        output = inputs.call(document_attention, impl=impl)
    assert not output.requires_grad
    assert torch.equal(output, inputs.call(document_attention, impl=impl).detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_absent_documents_are_ignored(impl: str) -> None:
    inputs = make_inputs(Case("absent", spans=((2, 7), (9, 9), (12, 17))), torch.float32)
    inputs.require_grad()
    first = inputs.run(document_attention, impl=impl)
    assert (first["scores"][:, 1] == 0).all()
    inputs.tensors["scores"].data[:, 1] = 50.0
    second = inputs.run(document_attention, impl=impl)
    assert torch.equal(first["output"], second["output"])


def test_shared_prefix_equals_the_expanded_one() -> None:
    inputs = make_inputs(Case("prefix", prefix=19, local=8, batch=3), torch.float32)
    shared = inputs.require_grad().run(document_attention, impl="cpu")
    oracle = Oracle.of(inputs)
    for name in ("prefix_key", "prefix_value"):
        expanded = inputs.tensors[name].detach().expand(3, -1, -1, -1).contiguous()
        inputs.tensors[name] = expanded.requires_grad_()
    separate = inputs.run(document_attention, impl="cpu")
    assert torch.equal(shared["output"], separate["output"])
    for name in ("prefix_key", "prefix_value"):
        assert oracle.complaint(name, shared[name]) is None
        assert oracle.complaint(name, separate[name].sum(0, keepdim=True)) is None


def test_explain_lists_every_implementation() -> None:
    inputs = make_inputs(Case("explain"), torch.float32)
    explanation = inputs.call(dream_kernels.explain)
    assert explanation.chosen == "cpu"
    assert set(explanation.reasons) == {"triton", "cuda", "cpu", "reference"}
    assert str(explanation).splitlines()[2].startswith("-> cpu")
    double = inputs.cast(torch.float64).call(dream_kernels.explain)
    assert double.chosen == "reference" and "float64" in double.reasons["cpu"]


def test_a_named_implementation_never_falls_back() -> None:
    inputs = make_inputs(Case("named"), torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        inputs.call(document_attention, impl="cpu")


@pytest.mark.parametrize("batch,rows,local", ((0, 5, 9), (2, 0, 9), (0, 0, 0)))
@pytest.mark.parametrize("window", (None, 4), ids=str)
def test_no_row_at_all(batch: int, rows: int, local: int, window: int | None) -> None:
    """An empty output, and gradients of 0, whatever the keys hold."""
    tensors = [
        torch.full(shape, torch.nan if i else 0.0, requires_grad=True)
        for i, shape in enumerate(
            ((batch, 4, rows, 8), (batch, 2, local, 8), (batch, 2, local, 6), (batch, 3))
        )
    ]  # fmt: skip
    spans = torch.zeros(batch, 3, 2, dtype=torch.long)
    tensors[3].data.zero_()
    output = document_attention(*tensors, spans, window=window)
    assert output.shape == (batch, 4, rows, 6)
    output.sum().backward()
    assert not any(tensor.grad.any() for tensor in tensors)
    mass = document_mass(*tensors[:2], spans, window=window)
    assert mass.shape == (batch, 4, rows, 3)
