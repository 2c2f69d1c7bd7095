"""Tensors whose memory is not what they say, or that have none, and transforms of PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace

import pytest
import torch

from dream_kernels import document_attention, document_mass
from helpers.cases import Case, Inputs, make_inputs

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
IMPLS = ("reference", "cpu", pytest.param("triton", marks=needs_triton))
# Small, because triton runs in its interpreter where there is no GPU.
SMALL = Case("small", batch=2, query_heads=2, key_heads=1, rows=3, local=6, prefix=5,
             spans=((0, 3), (4, 6)), padding=("right",))  # fmt: skip


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, as the negation of what is in memory."""
    view = torch._neg_view((-tensor.detach()).contiguous())
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def _conjugated(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, as the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(tensor.detach()), -tensor.detach()).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def _lazily(inputs: Inputs, view) -> Inputs:
    tensors = {name: view(t).requires_grad_() for name, t in inputs.tensors.items()}
    mask = inputs.options["attention_mask"]
    return replace(
        inputs,
        tensors=tensors,
        spans=torch._neg_view(-inputs.spans),
        options={**inputs.options, "attention_mask": torch._neg_view(-mask)},
        grad_output=view(inputs.grad_output),
    )


@pytest.mark.parametrize("view", (_negated, _conjugated))
@pytest.mark.parametrize("impl", IMPLS)
def test_views_that_leave_a_negation_to_their_reader(impl: str, view) -> None:
    inputs = make_inputs(SMALL, torch.float32).require_grad()
    expected = inputs.run(document_attention, impl=impl)
    actual = _lazily(inputs, view).run(document_attention, impl=impl)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_without_memory(impl: str) -> None:
    inputs = make_inputs(SMALL, torch.float32)
    for name in ("query", "scores", "prefix_value"):
        inputs.tensors[name] = torch.zeros_like(inputs.tensors[name])
    expected = inputs.call(document_attention, impl=impl)
    for name in ("query", "scores", "prefix_value"):
        inputs.tensors[name] = torch._efficientzerotensor(inputs.tensors[name].shape)
    assert torch.equal(inputs.call(document_attention, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_masses_of_lazy_views(impl: str) -> None:
    t, spans = make_inputs(SMALL, torch.float32).tensors, make_inputs(SMALL).spans
    expected = document_mass(t["query"], t["key"], spans, prefix=t["prefix_key"], impl=impl)
    for name in ("query", "key", "prefix_key"):
        own = {**t, name: _negated(t[name])}
        prefix = own["prefix_key"]
        actual = document_mass(own["query"], own["key"], spans, prefix=prefix, impl=impl)
        assert torch.equal(actual, expected), name


def test_a_compiled_function_reads_lazy_views_too() -> None:
    inputs = make_inputs(SMALL, torch.float32).require_grad()
    expected = inputs.run(document_attention, impl="cpu")
    torch._dynamo.reset()
    function = torch.compile(document_attention, fullgraph=True, backend="aot_eager")
    actual = _lazily(inputs, _negated).run(function, impl="cpu")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-6, msg=name)


def _on_meta(inputs: Inputs) -> Inputs:
    moved = inputs.to(torch.device("meta"))
    return replace(moved, grad_output=torch.empty(inputs.grad_output.shape, device="meta"))


def test_meta_tensors_give_shapes() -> None:
    inputs = make_inputs(SMALL, torch.float32)
    expected = inputs.require_grad().run(document_attention)
    for impl in ("auto", "reference"):
        actual = _on_meta(inputs).require_grad().run(document_attention, impl=impl)
        for name, value in expected.items():
            assert actual[name].is_meta, name
            assert actual[name].shape == value.shape and actual[name].dtype == value.dtype, name
    t = _on_meta(inputs).tensors
    mass = document_mass(t["query"], t["key"], inputs.spans.to("meta"), prefix=t["prefix_key"])
    assert mass.is_meta and mass.shape == (2, 2, 3, 2)
    with pytest.raises(NotImplementedError, match="impl='cpu' cannot run this call: it needs"):
        _on_meta(inputs).call(document_attention, impl="cpu")


@pytest.mark.parametrize("impl", ("auto", "cpu", "reference"))
def test_fake_tensors_give_shapes(impl: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    inputs = make_inputs(SMALL, torch.float32).require_grad()
    expected = inputs.run(document_attention)
    with FakeTensorMode() as mode:
        fakes = replace(
            inputs,
            tensors={n: mode.from_tensor(t).requires_grad_() for n, t in inputs.tensors.items()},
            spans=mode.from_tensor(inputs.spans),
            options={
                **inputs.options,
                "attention_mask": mode.from_tensor(inputs.options["attention_mask"]),
            },
            grad_output=mode.from_tensor(inputs.grad_output),
        )
        actual = fakes.run(document_attention, impl=impl)
    for name, value in expected.items():
        assert isinstance(actual[name], FakeTensor) and actual[name].device.type == "cpu"
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype, name
    # Nothing that has no values was kept for later calls.
    assert torch.equal(inputs.call(document_attention), expected["output"])


def test_a_dispatch_mode_sees_the_operator() -> None:
    """A graph recorded with real values holds the operator, not its result."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = make_inputs(SMALL, torch.float32)

    def function(query: torch.Tensor) -> torch.Tensor:
        inputs.tensors["query"] = query
        return inputs.call(document_attention, impl="cpu")

    query = inputs.tensors["query"]
    graph = make_fx(function)(query)
    assert torch.ops.dream_kernels.attend.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(2 * query), function(2 * query))


def _of_scores(inputs: Inputs):
    t = inputs.tensors

    def function(scores: torch.Tensor) -> torch.Tensor:
        return document_attention(t["query"], t["key"], t["value"], scores, inputs.spans).sum()

    return function, t["scores"]


def test_transforms_are_refused_in_one_line() -> None:
    case = Case("transforms", batch=2, query_heads=2, key_heads=1, rows=3, local=6, spans=((0, 3),))
    function, scores = _of_scores(make_inputs(case, torch.float32))
    message = r"^document_attention does not run under the transforms of torch.func [^\n]*$"
    for transformed in (
        torch.func.grad(function),
        torch.func.jacrev(function),
        torch.vmap(function),
        lambda s: torch.func.jvp(function, (s,), (s,)),
    ):
        with pytest.raises(NotImplementedError, match=message):
            transformed(scores)
    with pytest.raises(NotImplementedError, match=r"^torch.jit.trace cannot record [^\n]*$"):
        torch.jit.trace(function, (scores,), check_trace=False)
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        function(forward_ad.make_dual(scores, scores))


def test_tensors_of_other_layouts_are_refused() -> None:
    from torch.nested import nested_tensor

    inputs = make_inputs(SMALL, torch.float32)
    message = r"query must be a dense tensor of this process alone, got "
    dense = inputs.tensors["query"]
    for other in (dense.to_sparse(), nested_tensor(list(dense), layout=torch.jagged)):
        inputs.tensors["query"] = other
        with pytest.raises(TypeError, match=message):
            inputs.call(document_attention)


def test_compiling_warns_of_nothing() -> None:
    inputs = make_inputs(SMALL, torch.float32).require_grad()
    torch._dynamo.reset()
    function = torch.compile(document_attention, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inputs.run(function, impl="auto")
    assert not [str(w.message) for w in caught if "cache" in str(w.message)]
