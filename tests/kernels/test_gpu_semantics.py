"""The Triton kernels as compiled for Hopper, executed on the CPU: ``make test-gpu-semantics``.

Triton compiles every launch to its IR, at the tile shapes that a Hopper GPU would take, and ttsem
executes the IR with numpy in the inputs' own dtype. A launch fails if it reads or writes outside
the tensors it was given, if two programs touch one element and one of them writes it, or if an
operation has an undefined result. What no program wrote is NaN, or an integer far out of bounds.

``make test`` leaves this file out: ttsem wants one version of Triton. ``DREAM_SOAK=1`` runs
every case in every dtype, and every tile shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

sanitize = pytest.importorskip(
    "ttsem.sanitize", reason="ttsem is not installed: make test-gpu-semantics runs this file"
)
import triton
import triton.language as tl
from ttsem import _fakedriver, harness

from dream_kernels import autograd, set_value_checks
from dream_kernels.triton import call, device, launch, launcher, tiles
from dream_kernels.triton.implementation import TritonImplementation
from helpers.agreement import Oracle, problem_of
from helpers.cases import CASES, OPTION_CASES, Case, make_inputs
from helpers.soak_record import SOAK

HOPPER = 90
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON = TritonImplementation()
LONG = Case(
    "two_tiles_and_packs", batch=1, query_heads=3, key_heads=1, rows=20, prefix=250, local=20,
    spans=((0, 90), (95, 97), (97, 103), (110, 240), (249, 252)), head_dim=64,
)  # fmt: skip
# Rows of 9 times 16 bytes, and weights by row, which are loaded when a document is closed.
NARROW = replace(LONG, name="head_size_72_and_scores_per_head", head_dim=72, per_head_scores=True)
# Each walks other code: modes, padding, prefixes, splits of heads, and many documents.
FEW = (
    "adjacent_and_separated_documents-bias", "absent_documents-mass_0.6", "few_heads_scored",
    "scores_per_head-bias", "padding_inside_documents", "prefix_shared", "prefix_with_padding",
    "document_across_prefix_and_local-bias", "prefix_and_no_local_key", "many_documents",
    "large_head_size",
    # Options, of which the kernels hold what a call has: caps, sinks, windows, wide values.
    "sinks-mass_0.6", "window_over_a_prefix", "prefix_with_padding-options",
    "few_heads_scored-options-bias", NARROW.name,
)  # fmt: skip


def grid() -> list:
    """The few cases in bfloat16 and one in each of the others; or all in all."""
    cases = [*CASES, *OPTION_CASES, NARROW]
    by_name = {case.name: case for case in cases}
    few = [(by_name[name], torch.bfloat16) for name in FEW]
    few += [(by_name["prefix_shared"], torch.float16), (by_name["not_causal"], torch.float32)]
    chosen = [(case, dtype) for case in cases for dtype in DTYPES] if SOAK else few
    return [pytest.param(case, dtype, id=f"{case}-{dtype}") for case, dtype in chosen]


_compiled: dict[str, str] = {}


def compile_to_ttir(record: harness.LaunchRecord, stage: str, target: object, **_: object) -> str:
    """The IR of a launch, from a compilation that stops there; ttsem would make machine code."""
    options = harness._specialize(record.fn, record.args, record.kwargs, target)
    key = f"{record.fn.cache_key} {options}"
    if key not in _compiled:
        harness.mlir.enable_generic_printing()
        text = harness._stage_text(record, stage, target)
        _compiled[key] = harness.mlir.to_generic(text, None)
    return _compiled[key]


@pytest.fixture(autouse=True)
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[sanitize.Session]:
    """Every launch is executed by ttsem, as on a device with Hopper's tile shapes."""
    monkeypatch.setattr(device, "capability", lambda on: HOPPER // 10)
    monkeypatch.setattr(device, "processors", lambda on: 132)
    monkeypatch.setattr(harness, "ir_for_launch", compile_to_ttir)
    with sanitize.session(HOPPER, cuda_is_cpu=False) as opened:
        yield opened
    _fakedriver.unstub_torch_cuda()


@pytest.fixture(autouse=True)
def poisoned_integers(poisoned_empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an offset, an unwritten integer leads out of every tensor."""
    empty = torch.empty

    def poisoned(*arguments, **options) -> Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(0x5A5A5A5A) if tensor.dtype in (torch.int32, torch.int64) else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def attend(*arguments, **options) -> Tensor:
    """The kernels without the dispatch, which would not take them for tensors on the CPU."""
    return autograd.run(problem_of(*arguments, **options), TRITON)


def check(case: Case, dtype: torch.dtype, session: sanitize.Session) -> None:
    inputs = make_inputs(case, dtype)
    Oracle.of(inputs).check(inputs.require_grad().run(attend))
    assert session.launches >= 5  # of the forward, of each part of the backward
    assert session.races_unchecked == 0


@pytest.mark.parametrize("case,dtype", grid())
def test_agrees_with_reference(case: Case, dtype: torch.dtype, session: sanitize.Session) -> None:
    check(case, dtype, session)


@pytest.mark.parametrize("dtype", DTYPES if SOAK else DTYPES[:1], ids=str)
@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_split_keys_agree_with_reference(
    mode: str, dtype: torch.dtype, session: sanitize.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "MIN_SPLIT_KEYS", 64)
    check(Case(**{**vars(LONG), "mode": mode}), dtype, session)


@pytest.mark.parametrize("place", range(3) if SOAK else (0,))
@pytest.mark.parametrize("head_dim", (64, 128, 256) if SOAK else (64,))
def test_tile_shapes_agree_with_reference(
    head_dim: int, place: int, session: sanitize.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel at the shape in this place of its list, or the last of a shorter list."""
    listed = tiles.listed
    monkeypatch.setattr(tiles, "listed", lambda *which: listed(*which)[: place + 1][-1:])
    check(Case(**{**vars(LONG), "head_dim": head_dim}), torch.bfloat16, session)


def test_overlapping_spans_stay_within_the_tensors() -> None:
    """Their result is undefined, and on a GPU nothing checks them."""
    overlapping = Case(
        "overlapping", batch=1, prefix=100, local=108, spans=((100, 150),) * 3, head_dim=64
    )
    set_value_checks(False)
    try:
        make_inputs(overlapping, torch.bfloat16).call(attend)
    finally:
        set_value_checks(None)


def test_a_row_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, told that there is a row more than the tensors have."""

    def with_a_row_more(kernel, grid, arguments, **options) -> None:
        launcher.run(kernel, grid, {**arguments, "M": arguments["M"] + 1}, **options)

    monkeypatch.setattr(launch, "run", with_a_row_more)
    with pytest.raises(sanitize.KernelFault, match=r"`forward_kernel`.* past the end of"):
        make_inputs(LONG, torch.bfloat16).call(attend)


@triton.jit
def faulty_kernel(x, o, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    i_x = tl.program_id(0)
    o_n = tl.arange(0, BLOCK)
    if FAULT == "load":
        b_x = tl.load(x + i_x * BLOCK + o_n)
        tl.store(o + i_x * BLOCK + o_n, b_x, mask=i_x * BLOCK + o_n < n)
    elif FAULT == "overlap":
        b_x = tl.load(x + i_x * BLOCK + o_n, mask=i_x * BLOCK + o_n < n, other=0.0)
        tl.store(o + i_x + o_n, b_x, mask=i_x + o_n < n)
    else:
        b_x = tl.load(x + o_n, mask=o_n < n, other=0.0)
        tl.store(o + o_n * 0, b_x, mask=o_n < n)


@pytest.mark.parametrize(
    "fault,message",
    (
        ("load", r"reads 4 element\(s\) past the end of the tensor passed as `x`"),
        ("overlap", "program instances .* both touch element .* of `o`"),
        ("lanes", "an operation with an undefined result"),
    ),
)
def test_faults_are_caught(fault: str, message: str) -> None:
    x, o = torch.randn(12, dtype=torch.bfloat16), torch.zeros(12, dtype=torch.bfloat16)
    with pytest.raises(sanitize.KernelFault, match=message):
        faulty_kernel[(1 if fault == "lanes" else 2,)](x, o, 12, BLOCK=8, FAULT=fault)


def test_unwritten_memory_is_seen() -> None:
    out = torch.empty(4, dtype=torch.bfloat16)
    faulty_kernel[(1,)](torch.empty(4, dtype=torch.bfloat16), out, 4, BLOCK=4, FAULT="overlap")
    assert out.isnan().all()
