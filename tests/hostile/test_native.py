"""Sizes, spans and strides that no real call has, given to the operator and to the extension."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor

from dream_kernels import document_attention, document_mass
from dream_kernels.cpu import native_import_error
from fuzz import native

needs_native = pytest.mark.skipif(
    native_import_error() is not None, reason=f"no extension: {native_import_error()}"
)
BIG = 2**31


def call(spans: list[list[int]], length: int = 8, dtype: torch.dtype = torch.int64) -> Tensor:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, length, 8)
    places = torch.tensor([spans], dtype=dtype)
    scores = torch.zeros(1, len(spans))
    document_mass(query, key, places)
    return document_attention(query, key, key, scores, places, impl="cpu")


@needs_native
@pytest.mark.parametrize(
    "span",
    [
        [0, BIG - 1], [0, BIG], [0, BIG + 1], [BIG - 1, BIG], [2 * BIG, 2 * BIG + 4],
        [0, 2 * BIG], [-BIG, 4], [-BIG - 1, 4], [2**63 - 1, 2**63 - 1], [-(2**63), 2**63 - 1],
        [2**62, 2**62 + 1], [5, 9], [-1, 3], [4, 3],
    ],
)  # fmt: skip
def test_spans_beyond_the_keys_are_refused_regardless_of_their_size(span: list[int]) -> None:
    with pytest.raises(ValueError, match=r"spans must satisfy 0 <= start <= end <= 8"):
        call([span, [0, 2]])
    # 2^32 + 1 must not come out as 1 anywhere.
    assert call([[0, 2], [3, 8]]).isfinite().all()


@needs_native
def test_32_bit_spans_at_the_end_of_their_range() -> None:
    with pytest.raises(ValueError, match=r"got spans\[0, 0\] = \[0, 2147483647\]"):
        call([[0, BIG - 1]], dtype=torch.int32)


@needs_native
@pytest.mark.parametrize("sizes", [(1, BIG), (BIG, 1), (1, BIG // 2 + 2)], ids=str)
def test_lengths_near_2_to_the_31_are_refused_by_name(sizes: tuple[int, int]) -> None:
    """Expanded, so that they take no memory."""
    local, prefix = sizes
    query = torch.randn(1, 1, 1, 8)
    key, own = (torch.zeros(1, 1, 1, 8).expand(-1, -1, n, -1) for n in (local, prefix))
    prefixes = (own, own) if local <= prefix else None
    if local == 1 and prefix < BIG:
        # Each fits, and together they do not.
        key = key.expand(-1, -1, prefix, -1)
    with pytest.raises(ValueError, match=r"(key|prefix_key) .*2\^31 - 1"):
        document_attention(
            query, key, key, torch.zeros(1, 1), torch.zeros(1, 1, 2, dtype=torch.long),
            prefix=prefixes, impl="cpu",
        )  # fmt: skip


@needs_native
def test_a_hundred_thousand_documents_of_one_token() -> None:
    count = 2**17
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, count, 8)
    spans = torch.arange(count)[:, None] + torch.tensor([0, 1])
    arguments = (query, key, key, torch.zeros(1, count), spans[None])
    output = document_attention(*arguments, causal=False, impl="cpu")
    torch.testing.assert_close(output[0, 0, 0], key[0, 0].mean(0), atol=1e-4, rtol=1e-3)


def valid_case(name: str = "query") -> native.Case:
    """A call that the extension runs, with ``name`` and at least two of everything."""
    for seed in range(1000):
        case = native.Case(random.Random(seed).randbytes(160))
        several = all(min(block.shape) > 1 for block in case.inputs.values() if block.bytes)
        batch = case.inputs["query"].shape[0]
        if (
            name in case.inputs
            and several
            and batch > 1
            and case.gradients
            and case.run(native.load_native()) == 6
        ):
            return case
    raise AssertionError("no seed gives one")


@needs_native
@pytest.mark.parametrize(
    "name", ["query", "key", "value", "scores", "spans", "positions", "sinks", "heads"]
)
@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.strides.__setitem__(0, 2**61),
        lambda b: b.strides.__setitem__(0, -(2**63)),
        lambda b: b.strides.__setitem__(-1, b.bytes),
        lambda b: setattr(b, "address", b.address + 8 * (b.bytes // 8 + 1)),
        lambda b: setattr(b, "address", b.address - 8),
        lambda b: setattr(b, "bytes", b.bytes - 1),
        lambda b: setattr(b, "bytes", 2**64 - 1),
        lambda b: setattr(b, "memory", b.address + 8),
    ],
    ids=("overflow", "lowest", "stride", "behind", "before", "short", "around", "elsewhere"),
)
def test_what_may_exceed_its_memory_is_refused_by_name(name: str, change) -> None:
    module, case = native.load_native(), valid_case(name)
    change(case.inputs[name])
    with pytest.raises(ValueError, match=rf"{name} must"):
        case.problem(module)


@needs_native
@pytest.mark.parametrize("name", ["output", "state", "segment_outputs", "mass"])
def test_outputs_must_be_within_their_memory_without_overlap(name: str) -> None:
    module, case = native.load_native(), valid_case()
    block, strides = case.outputs[name], case.outputs[name].strides
    block.bytes -= 1
    assert case.run(module) < 6
    block.bytes += 1
    block.strides = [1] * 4
    assert case.run(module) < 6
    block.strides = strides
    assert case.run(module) == 6
    assert block.intact()


@needs_native
@pytest.mark.parametrize(
    "strides, fits",
    [((3, 1), True), ((1, 2), True), ((-3, 1), True), ((8, -2), True), ((1, 1), False),
     ((2, 1), False), ((0, 1), False), ((-2, 1), False), ((3, 0), False)],
)  # fmt: skip
def test_a_written_tensor_overlaps_itself_or_not(strides: tuple[int, int], fits: bool) -> None:
    """Two heads and three scores; with a step of 2 between heads they would share an element."""
    module = native.load_native()
    case = native.Case(b"")
    case.inputs["query"] = native.Block([1, 2, 4, 8], 4)
    case.inputs["key"] = case.inputs["value"] = native.Block([1, 2, 4, 8], 4)
    case.inputs["scores"], case.inputs["spans"] = native.Block([1, 2, 3], 4), spans_of_nothing()
    case.inputs["heads"] = native.Block([2], 1)
    case.options |= {"dtype": "float32", "scale": 1.0, "document_mass": None}
    state, output = native.Block([1, 2, 4, 4], 4), native.Block([1, 2, 4, 8], 4)
    memory = native.Block([64], 4)
    scores = (memory.address + 128, [1, 2, 3], [9, *strides], memory.memory, memory.bytes)

    def backward() -> None:
        module.backward(
            case.problem(module), state=state.argument(), output=output.argument(),
            grad_output=output.argument(), query=None, key=None, value=None, scores=scores,
            prefix_key=None, prefix_value=None, sinks=None, threads=1,
        )  # fmt: skip

    if fits:
        backward()
        return
    with pytest.raises(ValueError, match="grad_scores is written and must not overlap itself"):
        backward()


def spans_of_nothing() -> native.Block:
    block = native.Block([1, 3, 2], 8)
    block.write_int64([0] * 6)
    return block


@needs_native
@pytest.mark.parametrize("threads", [0, -1, -(2**31)])
def test_no_threads_are_refused(threads: int) -> None:
    module, case = native.load_native(), valid_case()
    case.threads = threads
    assert case.run(module) == 1


@needs_native
def test_two_billion_threads_are_as_many_as_the_machine_has() -> None:
    query, key = torch.randn(2, 4, 64, 64), torch.randn(2, 4, 2048, 64)
    arguments = (query, key, key, torch.zeros(2, 1), torch.tensor([[[0, 900]]] * 2))
    expected = document_attention(*arguments, impl="cpu")
    before = torch.get_num_threads
    try:
        torch.get_num_threads = lambda: 2**31 - 1
        assert torch.equal(document_attention(*arguments, impl="cpu"), expected)
    finally:
        torch.get_num_threads = before


def test_messages_name_an_argument() -> None:
    """The names that the fuzz target looks for are all that the extension has."""
    text = (native.Path(native.__file__).parents[2] / "csrc" / "bindings.cpp").read_text()
    arguments = set(re.findall(r'py::arg\("(\w+)"\)', text)) - {"problem"}
    assert arguments <= set(native.NAMES)
