"""The CUDA kernels: results on a GPU if there is one, else, as all else here, in their emulator.

That runs the source that nvcc compiles on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dream_kernels
from dream_kernels import cuda, document_attention, document_mass, set_value_checks
from helpers.agreement import Oracle, problem_of
from helpers.cases import BASE_CASES, CASES, GRADIENTS, MODES, Case, Inputs, make_inputs

if cuda.native_import_error() is not None:
    pytest.skip(
        f"the native extension is not built: {cuda.native_import_error()}",
        allow_module_level=True,
    )

from dream_kernels import _native

ON_GPU = torch.cuda.is_available() and bool(_native.cuda_architectures)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DREAM_KERNELS_CUDA_EMULATE", "1")
    yield
    settings()


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the keys of a call into as many splits as it has groups of 16."""
    monkeypatch.setattr(cuda, "processors", lambda device: 64)
    monkeypatch.setattr(cuda, "MIN_SPLIT_KEYS", 16)


def settings(backwards: bool = False, file: str = "", line: int = 0) -> None:
    _native.emulator_settings(backwards=backwards, file=file, line=line)


def with_head_size(case: Case) -> Case:
    """The case at a head size that the kernels have."""
    return replace(case, head_dim=128 if case.head_dim == 80 else 64)


def run(inputs: Inputs, **overrides) -> dict[str, Tensor | None]:
    return inputs.run(document_attention, impl="cuda", **overrides)


def check(inputs: Inputs, names: tuple[str, ...] = GRADIENTS) -> None:
    inputs = inputs.to(DEVICE)
    Oracle.of(inputs, names).check(run(inputs.require_grad(names)))


def _grid() -> list:
    """Every case in one of its four modes and one dtype; the others are slow."""
    found = []
    for i, case in enumerate(CASES):
        for j, dtype in enumerate(DTYPES):
            first = i % 4 == i // 4 % 4 and j == i // 4 // 4 % 2
            found.append(
                pytest.param(
                    with_head_size(case), dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}",
                    marks=() if first else pytest.mark.slow,
                )
            )  # fmt: skip
    return found


@pytest.mark.parametrize("case,dtype", _grid())
def test_agrees_with_reference(case: Case, dtype: torch.dtype) -> None:
    check(make_inputs(case, dtype))


def test_the_quick_grid_has_every_case_mode_and_dtype() -> None:
    quick = [p.values for p in _grid() if not p.marks]
    names = {case.name.rpartition("-")[0] or case.name for case, _ in quick}
    assert len(quick) == len(BASE_CASES)
    assert {case.name for case in BASE_CASES} == names
    assert {dtype for _, dtype in quick} == set(DTYPES)
    assert {(case.mode, case.document_mass) for case, _ in quick} == {
        ("reweight", None), ("reweight", 0.6), ("reweight", 1.0), ("bias", None),
    }  # fmt: skip


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_size_128(dtype: torch.dtype, mode: str, mass: float | None) -> None:
    case = Case(
        "large", head_dim=128, rows=20, prefix=37, local=33, spans=((0, 33), (34, 36), (40, 41)),
        padding=("left", "right"), heads=(0, 4), mode=mode, document_mass=mass,
    )  # fmt: skip
    check(make_inputs(case, dtype))


@pytest.mark.parametrize(
    "names",
    (
        (), ("query",), ("value",), ("scores",), ("scores", "query"), ("key", "prefix_key"),
        ("prefix_value", "scores"), ("query", "scores", "key", "value"),
    ),
    ids="+".join,
)  # fmt: skip
@MODES
def test_subsets_of_gradients(names: tuple[str, ...], mode: str, mass: float | None) -> None:
    case = Case(
        "subset", prefix=19, local=8, mode=mode, document_mass=mass, heads=(0, 4), head_dim=64,
        prefix_batch=2 if mode == "bias" else 1,
    )  # fmt: skip
    check(make_inputs(case, torch.bfloat16), names)


# Documents of several tiles, within one split, across two and across many; short ones; a rest.
SPLIT_SPANS = (
    ((3, 150), (150, 153), (160, 277), (280, 282), (155, 157)),
    ((170, 290), (0, 1), (1, 170), (0, 0), (0, 0)),
)


@MODES
@pytest.mark.parametrize("rows,head_dim", ((1, 64), (20, 128)))
def test_splits_of_the_keys_are_joined_exactly(
    rows: int, head_dim: int, mode: str, mass: float | None, split: None
) -> None:
    case = Case(
        "split", spans=SPLIT_SPANS, mode=mode, document_mass=mass, rows=rows, local=295,
        query_heads=2, key_heads=1, heads=(1,), padding=("left", "middle"), head_dim=head_dim,
    )  # fmt: skip
    inputs = make_inputs(case, torch.float16)
    assert cuda._Call(inputs.call(problem_of)).splits() > 10
    check(inputs)


@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_neither_a_second_run_nor_the_order_of_threads_changes_a_bit(
    mode: str, split: None
) -> None:
    case = Case(
        "twice", rows=20, prefix=83, local=25, spans=((2, 70), (70, 73)), query_heads=2,
        key_heads=1, mode=mode, head_dim=64,
    )  # fmt: skip
    inputs = make_inputs(case, torch.bfloat16).require_grad()
    first, second = run(inputs), run(inputs)
    settings(backwards=True)
    third = run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, third[name]), name


@MODES
def test_score_spread_of_1e4_and_vanishing_mass(mode: str, mass: float | None) -> None:
    inputs = make_inputs(Case("spread", mode=mode, document_mass=mass, head_dim=64), torch.bfloat16)
    inputs.tensors["scores"] = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, 1e4]])
    # Logits far apart: the mass of the second document underflows to zero in float32.
    inputs.tensors["key"][:, :, 7:12] = -40 * inputs.tensors["query"][:, ::3, :1].sign()
    inputs.tensors["key"][:, :, 2:7] *= 40
    check(inputs)


@pytest.mark.parametrize("mode", ("reweight", "bias"))
@pytest.mark.parametrize("where", ((slice(None), 1), (0,)), ids=("one document", "all"))
def test_minus_infinity_takes_all_weight(where: tuple, mode: str) -> None:
    inputs = make_inputs(Case("minus_infinity", mode=mode, head_dim=64), torch.bfloat16)
    inputs.tensors["scores"][where] = -torch.inf
    check(inputs)


def test_any_strides() -> None:
    """What cannot be read 16 bytes at a time is copied; heads may be the second to last."""
    inputs = make_inputs(Case("strides", head_dim=64, prefix=9), torch.bfloat16).require_grad()
    expected = run(inputs)
    for name, tensor in inputs.tensors.items():
        if name == "scores":
            continue
        tensor = tensor.detach()
        if name in ("query", "key"):
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        elif name == "value":
            tensor = torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
        else:  # begins at an address that is no multiple of 16 bytes
            tensor = torch.cat([torch.full_like(tensor[..., :3], torch.nan), tensor], -1)[..., 3:]
        inputs.tensors[name] = tensor.requires_grad_()
    for name, value in run(inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("causal", (True, False))
def test_document_mass(causal: bool) -> None:
    case = Case(
        "mass", rows=26, padding=("left",), spans=((14, 17), (2, 7), (9, 9)), head_dim=64,
        causal=causal, prefix=10, local=16,
    )  # fmt: skip
    inputs = make_inputs(case, torch.float16)
    t, mask = inputs.tensors, inputs.options["attention_mask"]
    masses = document_mass(
        t["query"], t["key"], inputs.spans, prefix=t["prefix_key"], attention_mask=mask,
        causal=causal, impl="cuda",
    )  # fmt: skip
    Oracle.of(inputs).check({**run(inputs.require_grad()), "mass": masses})


# -- Faults that the emulator must find


def barriers() -> list[tuple[str, int]]:
    """Every barrier that a call of some tiles, splits and gradients reaches."""
    _native.emulator_take_barriers()
    run(fault_inputs())
    return _native.emulator_take_barriers()


def fault_inputs() -> Inputs:
    # More positions than the plan has threads, the last document in another warp than the first,
    # documents of several tiles, and rows of both kinds.
    spans = (*((2 * i, 2 * i + 1) for i in range(40)), (300, 450))
    case = Case(
        "fault", batch=1, query_heads=2, key_heads=1, rows=40, local=480, spans=spans, heads=(1,),
        head_dim=64,
    )  # fmt: skip
    return make_inputs(case, torch.bfloat16).require_grad()


def test_every_barrier_is_needed(split: None) -> None:
    """Without any one of them a call fails, or its results depend on the order of threads."""
    inputs = fault_inputs()
    expected = run(inputs)
    places = barriers()
    assert len({file for file, _ in places}) == 3 and len(places) >= 9
    for place in places:
        caught = False
        for backwards in (False, True):
            settings(backwards, *place)
            try:
                results = run(inputs)
            except RuntimeError:
                caught = True
                continue
            caught |= any(not torch.equal(results[name], expected[name]) for name in expected)
        assert caught, place


def test_a_list_that_leads_out_of_the_tensors_is_caught() -> None:
    inputs = make_inputs(Case("bound", head_dim=64), torch.bfloat16)
    problem = inputs.call(problem_of)
    implementation = cuda.CudaImplementation()
    needs = cuda.Needs(True, True, True, True, False, False, False)
    output, (state, plan) = implementation.forward(problem, needs)
    keys = plan.view(torch.int32)[64 : 64 + problem.total_length]
    assert keys[:3].tolist() == [2, 3, 4]  # positions of the first document
    keys[0] = problem.total_length + 64
    with pytest.raises(RuntimeError, match=r"thread \d+ of block .* reads global memory outside"):
        implementation.backward(problem, output, (state, plan), inputs.grad_output, needs)


@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_impossible_spans_lead_nowhere_outside(mode: str) -> None:
    """On a GPU nobody checks them; the emulator checks every access."""
    spans = ((0, 20), (5, 30), (3, 9), (-7, 4), (22, 10), (18, 100))
    case = Case("impossible", head_dim=64, mode=mode, rows=30, prefix=9, local=15)
    inputs = make_inputs(case, torch.bfloat16).require_grad()
    inputs.tensors["scores"] = torch.zeros(2, 6, requires_grad=True)
    inputs.spans = torch.tensor([spans, spans[::-1]])
    inputs.options["attention_mask"] = None
    set_value_checks(False)
    try:
        run(inputs)
    finally:
        set_value_checks(None)


# -- What it refuses


@pytest.mark.parametrize(
    "changes,message",
    (
        ({"head_dim": 80}, "head sizes 64 and 128, got 80"),
        ({"softcap": 1.5}, "does not support softcap"),
        ({"sinks": True}, "does not support sinks"),
        ({"window": "tight"}, "does not support window"),
        ({"query_heads": 257, "key_heads": 257}, "up to 256 heads, got 257"),
    ),
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals_name_what_is_not_supported(changes: dict, message: str) -> None:
    inputs = make_inputs(replace(Case("refused", head_dim=64, rows=1), **changes), torch.float16)
    with pytest.raises(NotImplementedError, match=message):
        run(inputs)


def test_float32_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"float16 and bfloat16, got torch\.float32"):
        run(make_inputs(Case("float32", head_dim=64), torch.float32))


def test_cpu_tensors_need_the_emulator_and_auto_never_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(Case("named", head_dim=64), torch.bfloat16)
    explanation = inputs.call(dream_kernels.explain)
    assert explanation.chosen == "cpu"
    assert explanation.reasons["cuda"].startswith("can, emulated on the CPU")
    monkeypatch.delenv("DREAM_KERNELS_CUDA_EMULATE")
    with pytest.raises(NotImplementedError, match="needs tensors on a CUDA device, got cpu"):
        run(inputs)


def test_the_extension_checks_what_it_is_handed() -> None:
    problem = make_inputs(Case("checked", head_dim=64), torch.bfloat16).call(problem_of)
    call = cuda._Call(problem)
    output, state = torch.empty(problem.output_shape, dtype=torch.bfloat16), torch.empty(1)
    arguments = {
        "output": cuda.array(output), "state": cuda.array(state), "partial": None, "splits": 1,
        "stream": None, "plan": cuda.array(torch.empty(8, dtype=torch.uint8)),
    }  # fmt: skip
    with pytest.raises(ValueError, match="state must have"):
        _native.cuda_forward(call.native, **arguments)
    state = torch.empty(2, 6, 6, 5)
    with pytest.raises(ValueError, match=r"plan must be \d+ bytes or more, got shape"):
        _native.cuda_forward(call.native, **{**arguments, "state": cuda.array(state)})
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        _native.cuda_forward(call.native, **{**arguments, "splits": 0})
    shifted = torch.empty(problem.query.numel() + 8, dtype=torch.bfloat16)[1:-7]
    query = shifted.view(problem.query.shape)
    with pytest.raises(ValueError, match="query must be aligned to 16 bytes"):
        _native.cuda_forward(cuda.native_problem(replace(problem, query=query)), **arguments)


def test_the_plans_size_is_the_extensions() -> None:
    for case in BASE_CASES:
        problem = make_inputs(with_head_size(case), torch.bfloat16).call(problem_of)
        expected = _native.cuda_sizes(cuda.native_problem(problem), 1)[0]
        assert cuda._plan_bytes(problem) == expected, case
