"""The CPU kernel, and the emulated CUDA kernels, on random shapes, spans, masks and strides.

``DREAM_KERNELS_FUZZ_EXAMPLES`` sets how many are tried; any number but the default draws
new ones.
"""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dream_kernels import cuda, document_attention
from helpers.agreement import Oracle, problem_of
from helpers.cases import GRADIENTS, Inputs

DEFAULT_EXAMPLES = 200
EXAMPLES = int(os.environ.get("DREAM_KERNELS_FUZZ_EXAMPLES", DEFAULT_EXAMPLES))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 3, 8, 16, 17, 24, 64, 80)

settings.register_profile(
    "dream_kernels",
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == DEFAULT_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def relaid(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same numbers with other strides."""
    layout = draw(st.sampled_from(("contiguous", "heads last", "columns", "every second", "tail")))
    if layout == "heads last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every second":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    if layout == "tail":  # starts at an address that is aligned to its elements only
        padding = torch.full((*tensor.shape[:-1], 3), torch.nan, dtype=tensor.dtype)
        return torch.cat([padding, tensor], -1)[..., 3:]
    return tensor


@st.composite
def spans_over(draw: st.DrawFn, length: int) -> list[list[int]]:
    """Disjoint documents in any order, some absent."""
    most = min(length + 1, 24)
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=0, max_size=most)))
    pairs = [[a, b] for a, b in pairwise(cuts) if draw(st.integers(0, 3))]
    pairs += [[at, at] for at in draw(st.lists(st.integers(0, length), max_size=2))]
    return draw(st.permutations(pairs or [[0, 0]]))


@st.composite
def calls(
    draw: st.DrawFn, head_dims: tuple[int, ...] = HEAD_DIMS, dtypes: tuple = DTYPES,
    with_options: bool = True,
) -> Inputs:  # fmt: skip
    """A valid call, contiguous; without options neither a window, a soft cap nor sinks."""
    batch, key_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    query_heads = key_heads * draw(st.sampled_from((1, 2, 3, 7)))
    head_dim = draw(st.sampled_from(head_dims))
    prefix = draw(st.one_of(st.just(0), st.integers(1, 40), st.integers(100, 300)))
    local = draw(st.integers(0 if prefix else 1, 80))
    rows = draw(st.integers(1, 70))
    length = prefix + local
    if draw(st.booleans()):
        spans = [draw(spans_over(prefix or length))] * batch
    else:
        spans = [draw(spans_over(length)) for _ in range(batch)]
    documents = max(map(len, spans))
    spans = [row + [[0, 0]] * (documents - len(row)) for row in spans]

    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    per_head = draw(st.booleans())
    tensors = {
        "query": normal(batch, query_heads, rows, head_dim),
        "key": normal(batch, key_heads, local, head_dim),
        "value": normal(batch, key_heads, local, head_dim),
        "scores": draw(st.sampled_from((0.0, 1.0, 10.0)))
        * normal(*((batch, query_heads) if per_head else (batch,)), documents),
    }
    if prefix:
        prefix_batch = draw(st.sampled_from((1, batch)))
        tensors["prefix_key"] = normal(prefix_batch, key_heads, prefix, head_dim)
        tensors["prefix_value"] = normal(prefix_batch, key_heads, prefix, head_dim)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length, generator=g) > draw(st.sampled_from((0.05, 0.5, 0.99)))
        if draw(st.booleans()):
            mask[:] = mask[:1]
    value_dim = draw(st.sampled_from((head_dim, head_dim, 8, 33)))
    for name in ("value", "prefix_value"):
        if name in tensors:
            tensors[name] = normal(*tensors[name].shape[:3], value_dim)
    if with_options and draw(st.booleans()):
        tensors["sinks"] = draw(st.sampled_from((1.0, 10.0))) * normal(query_heads)
    mode = draw(st.sampled_from(("reweight", "bias")))
    options = {
        "mode": mode,
        "document_mass": draw(st.sampled_from((None, 0.3, 1.0))) if mode == "reweight" else None,
        "heads": draw(st.one_of(st.none(), st.sets(st.integers(0, query_heads - 1)).map(sorted))),
        "causal": draw(st.booleans()),
        "attention_mask": mask,
        "scale": draw(st.sampled_from((None, 0.3))),
        "softcap": draw(st.sampled_from((None, None, 0.5, 3.0, 50.0) if with_options else (None,))),
    }
    grad = normal(batch, query_heads, rows, value_dim)
    inputs = Inputs(tensors, torch.tensor(spans), options, grad)
    if with_options and draw(st.booleans()):
        narrow(draw, inputs, length)
    return inputs.cast(draw(st.sampled_from(dtypes)))


def narrow(draw: st.DrawFn, inputs: Inputs, length: int) -> None:
    """Give a call a window: where that would cut a scored row off, without heads for the scores."""
    options = inputs.options
    options |= {"causal": True, "window": draw(st.integers(1, 2 * length))}
    if draw(st.booleans()):
        start = st.integers(0, length)
        parts = draw(st.lists(st.tuples(start, start), min_size=1, max_size=6))
        positions = torch.arange(length).repeat(len(inputs.spans), 1)
        for place, first in parts:
            positions[:, place:] = first + torch.arange(length - place)
        options["positions"] = positions
    try:
        inputs.call(problem_of)
    except ValueError as error:
        if "window must reach" not in str(error):
            raise
        options["heads"] = ()


@settings(settings.get_profile("dream_kernels"))
@given(calls(), st.data(), st.sets(st.sampled_from(GRADIENTS)))
def test_any_valid_call_agrees_with_the_reference(call, data, names) -> None:
    check(call, data, tuple(names), "cpu")


# The emulator takes a tenth of a second for a call.
FEW = max(1, EXAMPLES // 10)


@settings(settings.get_profile("dream_kernels"), max_examples=FEW)
@given(
    calls((64, 128), (torch.bfloat16, torch.float16), with_options=False),
    st.data(),
    st.sets(st.sampled_from(GRADIENTS)),
    st.booleans(),
)
def test_any_call_of_the_cuda_kernels_agrees(call, data, names, split) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAM_KERNELS_CUDA_EMULATE", "1")
        if split:
            patch.setattr(cuda, "processors", lambda device: 64)
            patch.setattr(cuda, "MIN_SPLIT_KEYS", 16)
        check(call, data, tuple(names), "cuda")


def check(inputs: Inputs, data: st.DataObject, names: tuple[str, ...], impl: str) -> None:
    oracle = Oracle.of(inputs, names)
    for name, tensor in inputs.tensors.items():
        if name not in ("scores", "sinks"):
            inputs.tensors[name] = data.draw(relaid(tensor.detach()))
    inputs.grad_output = data.draw(relaid(inputs.grad_output))
    oracle.check(inputs.require_grad(names).run(document_attention, impl=impl))
