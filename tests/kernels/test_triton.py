"""The Triton kernels: on a GPU if there is one, else in triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import dream_kernels
from dream_kernels import document_attention, document_mass, set_value_checks
from dream_kernels.problem import Needs
from dream_kernels.triton.implementation import TritonImplementation
from helpers.agreement import Oracle, problem_of
from helpers.cases import (
    BASE_CASES,
    CASES,
    GRADIENTS,
    MODES,
    OPTION_CASES,
    Case,
    Inputs,
    make_inputs,
)
from helpers.own_process import run_command

triton = pytest.importorskip("triton", reason="triton is not installed")

from dream_kernels.triton import call, device, implementation, launch, plan, tiles, tuning
from dream_kernels.triton.blocks import COUNTS, LIKE_FIRST
from dream_kernels.triton.tiles import Config

ON_GPU = torch.cuda.is_available()
if not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    pytest.skip(
        "the interpreter of triton 3.2 stores 32-bit integers as 64-bit ones; 3.6 is known to work",
        allow_module_level=True,
    )
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not ON_GPU, reason="triton's interpreter computes wrong bfloat16 products"
        ),
    ),
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA or HIP device")


def _interpreter_cases(dtype: torch.dtype) -> list[Case]:
    """The interpreter takes a second a case, so not every case runs in all of its four modes.

    Every case runs in float32 with reweight and in float16 with one of the modes in turn, every
    second case in float32 with bias or a fixed mass, too. One case of three has two key heads.
    """
    count = len(BASE_CASES)
    if dtype == torch.float16:
        return [_with_one_key_head(CASES[4 * i + i % 4]) for i in range(count)]
    others = [CASES[4 * i + 1 + i % 4 // 2] for i in range(0, count, 2)]
    first = [c if i % 3 == 0 else _with_one_key_head(c) for i, c in enumerate(CASES[::4])]
    return [*first, *map(_with_one_key_head, others)]


def _with_one_key_head(case: Case) -> Case:
    """Half the programs, if the key heads are not what the case is about."""
    if case.heads is not None or (case.query_heads, case.key_heads) != (6, 2):
        return case
    # With so few terms the scores' gradient of a lone document nearly cancels: it is a difference
    # from the output, which float16 rounds.
    if case.name.startswith("absent_documents"):
        return case
    return replace(case, query_heads=3, key_heads=1)


def _grid() -> list:
    """The interpreter runs every case in one dtype or mode, or two; the others are slow."""
    return [
        pytest.param(
            case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}",
            marks=() if ON_GPU or _comes_first(i, dtype) else pytest.mark.slow,
        )
        for dtype in DTYPES_ON_GPU
        for i, case in enumerate(CASES if ON_GPU else _interpreter_cases(dtype))
        if ON_GPU or dtype != torch.bfloat16
    ]  # fmt: skip


def _comes_first(i: int, dtype: torch.dtype) -> bool:
    """Every case in float32 with reweight; of its other forms every second one."""
    return (dtype == torch.float32 and i < len(BASE_CASES)) or i % 2 == 1


def _grid_with_options() -> list:
    """Options alone, and every mandatory case with all of them; in the interpreter in turn.

    There each case has one mode and one dtype, and four of five are slow.
    """
    if ON_GPU:
        return [pytest.param(c, t, id=f"{c}-{t}") for c in OPTION_CASES for t in DTYPES_ON_GPU]
    alone = OPTION_CASES[: -3 * len(BASE_CASES)]
    crossed = OPTION_CASES[len(alone) :]
    found = [(case, ()) for case in alone]
    for i in range(len(BASE_CASES)):
        case = _with_one_key_head(crossed[3 * i + i // 5 % 3])
        found.append((case, () if i % 5 == 0 else pytest.mark.slow))
    dtypes = (torch.float32, torch.float16)
    return [
        pytest.param(case, dtypes[i % 2], id=f"{case}-{dtypes[i % 2]}", marks=marks)
        for i, (case, marks) in enumerate(found)
    ]


def inputs_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    return make_inputs(case, dtype, seed).to(DEVICE)


def run(inputs: Inputs, **overrides) -> dict[str, Tensor | None]:
    return inputs.run(document_attention, impl="triton", **overrides)


def check(inputs: Inputs, names: tuple[str, ...] = GRADIENTS) -> None:
    """Output and gradients against float64, and no gradient that nobody asked for."""
    Oracle.of(inputs, names).check(run(inputs.require_grad(names)))


@pytest.fixture
def larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time depends on the number of tiles."""
    monkeypatch.setattr(tiles, "INTERPRETER", Config(64, 64, 4, 1, slot=4))


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the keys of every call into as many splits as there are tiles, or about half."""
    monkeypatch.setattr(device, "processors", lambda on: 8)
    monkeypatch.setattr(call, "MIN_SPLIT_KEYS", 8)


@pytest.mark.parametrize("case,dtype", _grid())
def test_agrees_with_reference(
    case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if case.prefix + case.local > 100:
        request.getfixturevalue("larger_tiles")
    check(inputs_of(case, dtype))


@pytest.mark.parametrize("case,dtype", _grid_with_options())
def test_options_agree_with_reference(
    case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if case.prefix + case.local > 100:
        request.getfixturevalue("larger_tiles")
    check(inputs_of(case, dtype))


@MODES
@pytest.mark.parametrize("names", (("sinks",), ("sinks", "scores")), ids="+".join)
def test_gradient_of_the_sinks_alone(names: tuple[str, ...], mode: str, mass: float | None) -> None:
    case = Case(
        "sinks", mode=mode, document_mass=mass, heads=(0, 4), sinks=True, softcap=1.5,
        padding=("everything",), window="tight",
    )  # fmt: skip
    check(inputs_of(case), names)


@pytest.mark.parametrize("sink", (-60.0, 300.0))
def test_sinks_far_from_the_logits(sink: float) -> None:
    inputs = inputs_of(Case("far_sinks", sinks=True, rows=26, query_heads=3, key_heads=1))
    inputs.tensors["sinks"][1:] = sink
    check(inputs)


@pytest.mark.parametrize("mass", (None, 0.6), ids=str)
def test_a_sink_of_minus_infinity_is_none(mass: float | None, split: None) -> None:
    case = Case(
        "no_sinks", sinks=True, rows=26, query_heads=3, key_heads=1, document_mass=mass,
        padding=("everything",),
    )  # fmt: skip
    inputs = inputs_of(case)
    inputs.tensors["sinks"].fill_(-torch.inf)
    found = run(inputs.require_grad())
    assert not found.pop("sinks").any()
    del inputs.tensors["sinks"]
    for name, expected in run(inputs).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("size", (1e-4, 30.0), ids=str)
def test_soft_cap_of_tiny_and_of_large_logits(size: float) -> None:
    """The cap is accurate where it does next to nothing, and where it saturates."""
    inputs = inputs_of(Case("cap", softcap=2.0))
    inputs.tensors["query"] *= size
    check(inputs)


@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_only_scores_gradient_equals_the_full_one(mode: str) -> None:
    inputs = inputs_of(Case("only", mode=mode, prefix=19, local=8, padding=("left",)))
    check(inputs)
    check(inputs, ("scores",))
    assert inputs.tensors["scores"].grad.abs().max() > 1e-3


# The paths of the backward: each launches another set of kernels.
SUBSETS = (
    ("query",),
    ("value",),
    ("key", "prefix_key"),
    ("scores", "query"),
    ("scores", "query", "key", "value"),
    ("prefix_value", "scores"),
)


@pytest.mark.parametrize(
    "names,mode,mass",
    [(names, "reweight", None) for names in SUBSETS]
    + [(names, *mode) for names in SUBSETS[1:4] for mode in (("reweight", 0.6), ("bias", None))],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_subsets_of_gradients(names: tuple[str, ...], mode: str, mass: float | None) -> None:
    case = Case(
        "subset", prefix=19, local=8, mode=mode, document_mass=mass, query_heads=3, key_heads=1,
        heads=(0, 2),
    )  # fmt: skip
    check(inputs_of(case), names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_equal(dtype: torch.dtype, split: None) -> None:
    case = Case(
        "twice", rows=5, prefix=43, local=5, batch=2, query_heads=2, key_heads=1,
        spans=((2, 30), (30, 33)),
    )  # fmt: skip
    inputs = inputs_of(case, dtype).require_grad()
    first, second = run(inputs), run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Documents of several tiles, within one split, across two and across many; short ones; a rest.
SPLIT_SPANS = (((3, 50), (50, 53), (60, 77), (80, 82), (55, 57)), ((70, 90), (0, 1), (1, 70)))


@pytest.mark.parametrize(
    "mode,mass,rows",
    (
        ("reweight", None, 1),
        ("reweight", None, 48),
        ("reweight", 0.6, 20),
        ("bias", None, 20),
    ),
)
def test_splits_of_the_keys_are_joined_exactly(
    mode: str, mass: float | None, rows: int, split: None
) -> None:
    spans = tuple(spans + ((0, 0),) * (5 - len(spans)) for spans in SPLIT_SPANS)
    case = Case(
        "split", spans=spans, mode=mode, document_mass=mass, rows=rows, local=95, query_heads=2,
        key_heads=1, heads=(1,), padding=("left", "middle"),
    )  # fmt: skip
    check(inputs_of(case))


@MODES
def test_splits_with_all_options(mode: str, mass: float | None, split: None) -> None:
    case = Case(
        "split", spans=((60, 77), (80, 82), (40, 58), (84, 89)), mode=mode, document_mass=mass,
        rows=20, local=95, query_heads=2, key_heads=1, heads=(1,), padding=("left",),
        window="tight", softcap=1.5, sinks=True, positions=mass is not None,
    )  # fmt: skip
    check(inputs_of(case))


@MODES
@pytest.mark.parametrize(
    "spans,padding,heads",
    [
        pytest.param(((2, 13), (14, 17), (17, 18)), ("right",), None, id="alike"),
        pytest.param(((2, 13), (14, 17), (17, 18)), ("right",), (1,), id="alike, one head"),
        pytest.param(
            (((2, 13), (14, 17)), ((0, 0), (3, 9)), ((0, 1), (1, 19))), (), None, id="other spans"
        ),
        pytest.param(((2, 13), (14, 17)), ("left", "middle"), None, id="other padding"),
        pytest.param(((2, 13), (17, 21)), (), None, id="a document among the local keys"),
    ],
)
def test_rows_of_a_batch_share_tiles_over_a_shared_prefix(
    spans: tuple, padding: tuple, heads: tuple | None, mode: str, mass: float | None
) -> None:
    case = Case(
        "fold", spans=spans, padding=padding, heads=heads, batch=3, rows=3, local=4, prefix=19,
        query_heads=2, key_heads=1, mode=mode, document_mass=mass,
    )  # fmt: skip
    grid = call.Call(inputs_of(case).call(problem_of)).grid(Config(64, 16, 4, 1))
    assert grid.fold and grid.shape == (1, 1, 1)
    check(inputs_of(case))


@MODES
@pytest.mark.parametrize("apart", (0, 1000), ids=("alike", "other positions"))
def test_folded_rows_with_all_options(apart: int, mode: str, mass: float | None) -> None:
    case = Case(
        "fold", spans=((2, 13), (14, 17), (17, 18)), heads=(1,), batch=3, rows=3, local=4,
        prefix=19, query_heads=2, key_heads=1, mode=mode, document_mass=mass, window="tight",
        positions=True, softcap=1.5, sinks=True,
    )  # fmt: skip
    inputs = inputs_of(case)
    inputs.options["positions"][1] += apart
    problem = inputs.call(problem_of)
    counts = plan.Plan.of(problem).documents_in_tiles(16, 4).counts
    alike = counts[: 3 * COUNTS.value].view(3, -1)[:, LIKE_FIRST.value]
    assert alike.tolist() == [1, 1 if apart == 0 else 0, 1]
    check(inputs)


def test_keys_and_rows_beyond_the_window_are_not_visited() -> None:
    """NaN where no tile may be read: in keys before the windows, in rows after them."""
    case = Case(
        "skipped", spans=((88, 91),), rows=32, local=96, window=16, heads=(0,), query_heads=2,
        key_heads=1,
    )  # fmt: skip
    inputs = inputs_of(case)
    for name in ("key", "value"):
        inputs.tensors[name][:, :, :32] = torch.nan
    results = run(inputs.require_grad(("query", "scores")))
    assert all(results[name].isfinite().all() for name in ("output", "query", "scores"))

    inputs = inputs_of(replace(case, spans=((0, 0),), rows=96))
    inputs.grad_output[:, :, -16:] = torch.nan
    results = run(inputs.require_grad(("key", "value")))
    assert all(results[name][:, :, :32].isfinite().all() for name in ("key", "value"))


@MODES
def test_folded_tiles_of_several_heads(
    mode: str, mass: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that begin and end inside a batch, and hold elements that are not alike."""
    small = Config(rows=16, keys=16, warps=4, stages=1, slot=4)
    monkeypatch.setattr(tiles, "INTERPRETER", small)
    spans = (((2, 33), (40, 43)),) * 4 + (((5, 9), (9, 42)),)
    case = Case(
        "folds", spans=spans, batch=5, rows=3, local=3, prefix=45, query_heads=3, key_heads=1,
        mode=mode, document_mass=mass, heads=(0, 2),
    )  # fmt: skip
    check(inputs_of(case))


@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_a_thousand_documents_of_few_tokens(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER", Config(64, 256, 4, 1, slot=4))
    if not ON_GPU:  # fewer steps for the interpreter, the same ones
        monkeypatch.setattr(launch, "DOCUMENT_BLOCK", 256)
    widths = [1 + i % 3 for i in range(1024)]
    starts = [2 + sum(widths[:i]) for i in range(1024)]
    spans = tuple((start, start + width) for start, width in zip(starts, widths))
    case = Case(
        "thousand", spans=spans[::-1], batch=1, query_heads=2, key_heads=1, rows=3,
        local=spans[-1][1] + 3, mode=mode,
    )  # fmt: skip
    check(inputs_of(case), ("scores", "query"))


@pytest.mark.parametrize("prefix_batch", (1, 5))
def test_batches_larger_than_a_grid(prefix_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "MAX_GRID", 2)
    case = Case(
        "many", batch=5, query_heads=2, key_heads=1, rows=3, local=4, prefix=19, sinks=True,
        prefix_batch=prefix_batch, padding=("left",), heads=(1,),
    )  # fmt: skip
    inputs = inputs_of(case)
    check(inputs)
    mass = implementation.TritonImplementation().mass(inputs.call(problem_of))
    assert mass.shape == (5, 2, 3, len(inputs.spans[0]))


@MODES
def test_score_spread_of_1e4_and_vanishing_mass(mode: str, mass: float | None) -> None:
    inputs = inputs_of(Case("spread", mode=mode, document_mass=mass))
    inputs.tensors["scores"] = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, 1e4]], device=DEVICE)
    # Logits 300 apart: the mass of the second document underflows to zero in float32.
    inputs.tensors["key"][:, :, 7:12] = -40 * inputs.tensors["query"][:, ::3, :1].sign()
    inputs.tensors["key"][:, :, 2:7] *= 40
    check(inputs)


@pytest.mark.parametrize("mode", ("reweight", "bias"))
@pytest.mark.parametrize("where", ((slice(None), 1), (0,)), ids=("one document", "all"))
def test_minus_infinity_takes_all_weight(where: tuple, mode: str) -> None:
    inputs = inputs_of(Case("minus_infinity", mode=mode))
    inputs.tensors["scores"][where] = -torch.inf
    check(inputs)


def test_a_row_that_sees_no_key_gives_zero_and_no_gradient() -> None:
    case = Case("blind", rows=26, padding=("left",), query_heads=3, key_heads=1)
    result = run(inputs_of(case).require_grad())
    assert (result["output"][:, :, :2] == 0).all()
    assert (result["query"][:, :, :2] == 0).all()
    assert (result["query"][0, :, :5] == 0).all()


def test_no_key_at_all() -> None:
    case = Case("no_keys", rows=2, local=0, spans=((0, 0),), sinks=True)
    assert not any(tensor.any() for tensor in run(inputs_of(case).require_grad()).values())


@pytest.mark.parametrize("head_dim", (8, 72, 88))
def test_head_sizes_that_are_no_multiple_of_16(head_dim: int) -> None:
    check(
        inputs_of(Case("head", head_dim=head_dim, query_heads=3, key_heads=1, prefix=19, local=8))
    )


@pytest.mark.parametrize("scale", (-0.3, 0.0))
def test_negative_and_zero_scale(scale: float) -> None:
    inputs = inputs_of(Case("scale"))
    inputs.options["scale"] = scale
    check(inputs)


@pytest.mark.parametrize("which", ("all", "prefix"))
def test_inputs_of_any_strides(which: str) -> None:
    inputs = inputs_of(Case("strides", prefix=19, local=8, query_heads=3, key_heads=1))
    for name, tensor in inputs.tensors.items():
        if name != "scores" and (which == "all" or name.startswith(which)):
            # [B, T, H, D] in memory, as models produce it, and every other element of D
            spread = torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], -1)
            strided = spread.transpose(1, 2).contiguous().transpose(1, 2)[..., 0]
            assert not strided.is_contiguous() and strided.stride(-1) == 2
            inputs.tensors[name] = strided.detach()
    inputs.grad_output = inputs.grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs)


def test_expanded_gradient_of_a_sum() -> None:
    """``output.sum().backward()`` hands the backward a gradient with zero strides."""
    inputs = inputs_of(Case("sum"))
    inputs.grad_output = torch.ones((), device=DEVICE).expand_as(inputs.grad_output)
    check(inputs)


MASS_CASES = [
    case
    for case in BASE_CASES
    if case.name
    in (
        "absent_documents", "one_token_documents", "rows_before_and_inside_documents",
        "more_rows_than_keys", "prefix_with_padding", "document_across_prefix_and_local",
        "row_of_padding_only", "own_scale", "large_head_size", "not_causal",
    )
]  # fmt: skip


@pytest.mark.parametrize("case", MASS_CASES, ids=str)
def test_document_mass(case: Case) -> None:
    inputs = inputs_of(case)
    t = inputs.tensors
    mass = document_mass(
        t["query"], t["key"], inputs.spans, scale=case.scale, causal=case.causal,
        attention_mask=inputs.options["attention_mask"], prefix=t.get("prefix_key"), impl="triton",
    )  # fmt: skip
    assert Oracle.of(inputs, ()).complaint("mass", mass) is None


@pytest.mark.parametrize("case", MASS_CASES[1:4], ids=str)
def test_document_mass_with_all_options(case: Case) -> None:
    """The window cuts documents too: it is plain attention."""
    plain = replace(case, window=7, positions=True, softcap=1.5, sinks=True, heads=())
    inputs = inputs_of(plain)
    t, given = inputs.tensors, inputs.options
    mass = document_mass(
        t["query"], t["key"], inputs.spans, attention_mask=given["attention_mask"],
        prefix=t.get("prefix_key"), impl="triton", sinks=t["sinks"],
        **{name: given[name] for name in ("scale", "causal", "window", "positions", "softcap")},
    )  # fmt: skip
    assert Oracle.of(inputs, ()).complaint("mass", mass) is None


def test_unchecked_spans_stay_inside_memory() -> None:
    inputs = inputs_of(Case("unchecked", spans=((2, 1000), (-7, 9), (20, 22))))
    set_value_checks(False)
    try:
        output = inputs.call(document_attention, impl="triton")
    finally:
        set_value_checks(None)
    assert output.shape == inputs.tensors["query"].shape


@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_empty_saved_has_the_form_of_what_forward_saves(mode: str) -> None:
    problem = inputs_of(Case("saved", mode=mode)).call(problem_of)
    implementation = TritonImplementation()
    needs = Needs(True, True, True, True, False, False, False)
    output, saved = implementation.forward(problem, needs)
    empty = implementation.empty_saved(problem, needs)
    assert [(t.shape, t.dtype, t.device) for t in empty] == [
        (t.shape, t.dtype, t.device) for t in saved
    ]
    kept = {t.untyped_storage().data_ptr() for t in saved}
    assert output.untyped_storage().data_ptr() not in kept
    # The backward takes what the forward saved, without the graph around it.
    gradients = implementation.backward(problem, output, saved, torch.ones_like(output), needs)
    assert [g is not None for g in gradients] == list(needs)


def test_why_not_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = TritonImplementation()
    problem = inputs_of(Case("why")).call(problem_of)
    assert implementation.why_not(problem) is None
    double = replace(problem, query=problem.query.double())
    assert "float64" in str(implementation.why_not(double))
    wide = replace(problem, query=torch.zeros(2, 6, 5, 257, device=DEVICE))
    assert "up to 256, got 257" in str(implementation.why_not(wide))
    many = replace(problem, query=problem.query[:, :1].expand(-1, 65_536, -1, -1))
    assert "up to 65535 heads, got 65536" in str(implementation.why_not(many))
    many = replace(problem, query=problem.query[:1].expand(65_536, -1, -1, -1))
    assert implementation.why_not(many) is None
    if not ON_GPU:
        half = replace(problem, query=problem.query.bfloat16())
        assert "interpreter" in str(implementation.why_not(half))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    on_cpu = replace(problem, query=problem.query.cpu())
    assert "got cpu" in str(implementation.why_not(on_cpu))


def test_old_and_missing_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.1.0")
    assert "3.2 or newer, got 3.1.0" in str(device.triton_missing.__wrapped__())
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in str(device.triton_missing.__wrapped__())


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refusal = device.device_refusal.__wrapped__(torch.device("cuda"))
    assert "8.0 or newer, got 7.5" in str(refusal)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert device.device_refusal.__wrapped__(torch.device("cuda")) is None


def test_amd_gpus_that_nothing_was_compiled_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(name: str) -> str | None:
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return device.device_refusal.__wrapped__(torch.device("cuda"))

    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert refusal("gfx942:sramecc+:xnack-") is None
    assert "gfx942 only, got gfx1030" in str(refusal("gfx1030"))


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    yield
    torch.set_float32_matmul_precision("highest")
    if before is not None:  # the newer switch, which also has an unset state
        torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_follows_the_switch_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, matmul_precision: None
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    card = torch.device("cuda")
    assert device.product_precision(torch.float32, card) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert device.product_precision(torch.float32, card) == "tf32"
    assert (
        device.product_precision(torch.bfloat16, card) == "ieee"
    )  # else the kernels would be compiled again
    assert device.product_precision(torch.float32, torch.device("cpu")) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert device.product_precision(torch.float32, card) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert device.product_precision(torch.float32, card) == "ieee"


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this torch has the old switch only"
)
def test_tf32_follows_the_newer_switch(matmul_precision: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert device.product_precision(torch.float32, torch.device("cuda")) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert device.product_precision(torch.float32, torch.device("cuda")) == "ieee"


@pytest.mark.skipif(ON_GPU, reason="without a GPU only: the interpreter is not for production")
def test_auto_does_not_choose_the_interpreter() -> None:
    explanation = inputs_of(Case("auto")).call(dream_kernels.explain)
    assert explanation.chosen != "triton"
    assert "interpreter" in explanation.reasons["triton"]


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, dream_kernels; sys.exit('triton' in sys.modules)"
    run_command(sys.executable, "-c", code, check=True)


def test_the_fastest_configuration_is_kept_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    slow, fast, huge = (Config(rows, 64, 4, 2) for rows in (32, 64, 128))
    timed = []

    def milliseconds(launch_once) -> float:
        timed.append(launch_once())
        return {slow: 2.0, fast: 1.0}[timed[-1]]

    def launch_once(candidate: Config) -> Config:
        if candidate == huge:
            raise OutOfResources(300, 200, "shared memory")
        return candidate

    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv("DREAM_KERNELS_TUNE", str(path))
    monkeypatch.setattr(device, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(device, "name", lambda on: "card")
    monkeypatch.setattr(device, "capturing", lambda: False)
    card, configs = torch.device("cuda"), (slow, huge, fast)
    assert tuning.choose(("k", 1), configs, launch_once, card) == fast
    assert tuning.choose(("k", 1), configs, launch_once, card) == fast
    monkeypatch.setattr(tuning, "_fastest", {})  # another process
    assert tuning.choose(("k", 1), configs, launch_once, card) == fast
    monkeypatch.setattr(device, "name", lambda on: "another card")
    monkeypatch.setattr(device, "capturing", lambda: True)
    assert tuning.choose(("k", 1), configs, launch_once, card) == slow
    assert timed == [slow, fast]


@pytest.mark.parametrize("tune", (None, "", "0"))
def test_by_default_tile_shapes_are_those_of_the_table(
    tune: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DREAM_KERNELS_TUNE", raising=False)
    if tune is not None:
        monkeypatch.setenv("DREAM_KERNELS_TUNE", tune)
    monkeypatch.setattr(device, "milliseconds", lambda launch_once: pytest.fail("timed"))
    configs = (Config(32, 64, 4, 2), Config(64, 64, 4, 2))
    assert tuning.choose(("k", 1), configs, lambda config: None, torch.device("cuda")) == configs[0]


def test_errors_of_the_tuning_file_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = (Config(32, 64, 4, 2), Config(64, 64, 4, 2))
    monkeypatch.setattr(device, "name", lambda on: "card")
    monkeypatch.setattr(device, "capturing", lambda: False)
    path = tmp_path / "tiles.json"
    path.write_text('{"k": [1, 2]}')
    for tune, complaint in (("1", "a .json file, or 0 for none, got '1'"), (str(path), str(path))):
        monkeypatch.setenv("DREAM_KERNELS_TUNE", tune)
        with pytest.raises(ValueError, match=complaint):
            tuning.choose(("k",), configs, lambda config: None, torch.device("cuda"))


def test_tiles_are_no_taller_than_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    kernels = ("forward", "documents", "query")
    forms = [f"{kernel}{form}" for kernel in kernels for form in ("", "-fold", "-split")]
    for kernel in (*forms, "keys", "mass"):
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (16, 64, 80, 96, 128, 256):
                for capability in (0, 8, 9, 10, 12):
                    family = tiles.family_of(capability)
                    found = tuning.candidates(kernel, head_dim, dtype, 20, family)
                    assert found
                    assert all(c.rows <= 32 for c in found)
                    assert len(set(found)) == len(found)


def test_triton_3_2_gets_tiles_that_it_can_compile_for_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    arguments = ("forward-split", 128, torch.bfloat16, 1024)
    for old in (False, True):
        monkeypatch.setattr(tuning, "_ONE_GROUP", old)
        found = {c.rows: c.warps for c in tuning.candidates(*arguments, "hopper")}
        assert found == {64: 4 if old else 8, 128: 8}
        assert tuning.candidates(*arguments, "ampere")[0].warps == 8


@needs_gpu
@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_runs_in_a_cuda_graph_and_never_waits_for_the_device(mode: str) -> None:
    case = Case("graph", mode=mode, rows=16, prefix=300, local=16, spans=((3, 90), (90, 200)))
    inputs = inputs_of(case, torch.bfloat16).require_grad()
    expected = run(inputs)  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor in inputs.tensors.values():
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = inputs.call(document_attention, impl="triton")
        output.backward(inputs.grad_output)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected["output"])
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor.grad, expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA or HIP devices")
def test_runs_on_a_device_that_is_not_the_current_one() -> None:
    inputs = make_inputs(Case("second"), torch.float32).to(torch.device("cuda:1")).require_grad()
    expected = inputs.run(document_attention, impl="reference")
    for name, value in run(inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@needs_gpu
def test_new_sizes_within_a_bucket_do_not_recompile() -> None:
    from dream_kernels.triton import coefficients, forward, keys, rows, work_list

    kernels = (
        work_list.list_documents_kernel, work_list.list_keys_kernel, work_list.weights_kernel,
        forward.forward_kernel, rows.rows_kernel, keys.keys_kernel,
        coefficients.coefficients_kernel,
    )  # fmt: skip

    def compiled() -> list[int]:
        return [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]

    before = None
    # Sizes that are and are not multiples of 16, which triton would distinguish.
    for n_rows, local, count in ((48, 300, 13), (33, 511, 16), (64, 270, 9)):
        spans = tuple((i * 9, i * 9 + 8) for i in range(count))
        case = Case("bucket", rows=n_rows, local=local, spans=spans, head_dim=64)
        run(inputs_of(case, torch.float16).require_grad())
        before = before or compiled()
    assert compiled() == before


@needs_gpu
@pytest.mark.parametrize("head_dim", (64, 80, 96, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_realistic_sizes(head_dim: int, dtype: torch.dtype) -> None:
    spans = tuple((7 + i * 260, 7 + i * 260 + 200 + i) for i in range(15))
    case = Case(
        "real", spans=spans, query_heads=14, key_heads=2, rows=128, local=128, prefix=4096,
        head_dim=head_dim, heads=(0, 3, 9), padding=("right",),
    )  # fmt: skip
    check(inputs_of(case, dtype))
