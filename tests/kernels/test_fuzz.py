"""The CPU kernel on shapes, spans, masks and strides that nobody thought of.

``DREAM_KERNELS_FUZZ_EXAMPLES`` sets how many are tried; any number but the default draws
new ones.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agreement import assert_as_good_as_plain_pytorch, formulas
from cases import GRADIENTS, Inputs
from dream_kernels import document_attention

DEFAULT_EXAMPLES = 200
EXAMPLES = int(os.environ.get("DREAM_KERNELS_FUZZ_EXAMPLES", DEFAULT_EXAMPLES))
# A gradient is that many roundings deep: logit, exponential, normaliser, product, mean, sum, ...
ROUNDINGS = 8
PERTURBATIONS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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
def calls(draw: st.DrawFn) -> tuple[Inputs, torch.dtype]:
    """A valid call with any combination of options, in float64 and contiguous."""
    batch, key_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    query_heads = key_heads * draw(st.sampled_from((1, 2, 3, 7)))
    head_dim = draw(st.sampled_from((1, 3, 8, 16, 17, 24, 64, 80)))
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
    mode = draw(st.sampled_from(("reweight", "bias")))
    options = {
        "mode": mode,
        "document_mass": draw(st.sampled_from((None, 0.3, 1.0))) if mode == "reweight" else None,
        "heads": draw(st.one_of(st.none(), st.sets(st.integers(0, query_heads - 1)).map(sorted))),
        "causal": draw(st.booleans()),
        "attention_mask": mask,
        "scale": draw(st.sampled_from((None, 0.3))),
    }
    grad = normal(batch, query_heads, rows, head_dim)
    dtype = draw(st.sampled_from(DTYPES))
    return Inputs(tensors, torch.tensor(spans), options, grad).cast(dtype), dtype


def one_rounding_of_the_summands(inputs: Inputs, dtype: torch.dtype) -> dict[str, float]:
    """A rounding of the numbers that a result is the difference of, also where it is exactly 0."""
    size = {name: t.abs().max().item() if t.numel() else 0.0 for name, t in inputs.tensors.items()}
    for name in ("key", "value"):
        size[name] = max(size[name], size.get(f"prefix_{name}", 0.0))
    batch, heads, rows, head_dim = inputs.tensors["query"].shape
    summands = (batch * heads * rows) ** 0.5
    grad = inputs.grad_output.abs().max().item()
    logit_grad = grad * size["value"] * head_dim**0.5
    scale = inputs.options["scale"] or head_dim**-0.5
    per_result = {
        "output": size["value"],
        "query": scale * logit_grad * size["key"],
        "key": scale * logit_grad * size["query"] * summands,
        "value": grad * summands,
        "scores": logit_grad * summands,
    }
    per_result |= {f"prefix_{name}": per_result[name] for name in ("key", "value")}
    return {name: torch.finfo(dtype).eps * size for name, size in per_result.items()}


def rounding_floors(
    inputs: Inputs, names: tuple[str, ...], oracle: dict, dtype: torch.dtype
) -> dict[str, float]:
    """How far the exact results move when every number moves by some roundings.

    A result may be one number in which large ones cancel: its own size then says nothing of how
    exactly anybody can compute it.
    """
    g = torch.Generator().manual_seed(0)
    floors = one_rounding_of_the_summands(inputs, dtype)
    for _ in range(PERTURBATIONS):
        moved = inputs.cast(torch.float64)
        for name, tensor in moved.tensors.items():
            signs = torch.randint(0, 2, tensor.shape, generator=g) * 2 - 1
            moved.tensors[name] = tensor * (1 + torch.finfo(dtype).eps * signs)
        result = moved.require_grad(names).run(formulas)
        for name, expected in oracle.items():
            if expected is not None and expected.numel():
                effect = (result[name] - expected).abs().max().item()
                floors[name] = max(floors[name], ROUNDINGS * effect)
    return floors


@settings(settings.get_profile("dream_kernels"))
@given(calls(), st.data(), st.sets(st.sampled_from(GRADIENTS)))
def test_any_valid_call_agrees_with_the_reference(call, data, names) -> None:
    inputs, dtype = call
    names = tuple(names)
    oracle = inputs.cast(torch.float64).require_grad(names).run(formulas)
    floors = rounding_floors(inputs, names, oracle, dtype)
    plain = inputs.require_grad(names).run(document_attention, impl="reference")
    for name, tensor in inputs.tensors.items():
        if name != "scores":
            inputs.tensors[name] = data.draw(relaid(tensor.detach()))
    inputs.grad_output = data.draw(relaid(inputs.grad_output))
    actual = inputs.require_grad(names).run(document_attention, impl="cpu")
    assert_as_good_as_plain_pytorch(inputs, actual, oracle, plain, dtype, floors)
