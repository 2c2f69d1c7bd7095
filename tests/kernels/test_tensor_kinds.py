"""Tensors whose memory is not what they say, or that have none, and transforms of PyTorch."""

from __future__ import annotations

import importlib.util
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
