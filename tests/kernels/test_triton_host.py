"""What the host does in a call of the Triton kernels, what it keeps, and what graphs allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dream_kernels import document_attention, set_value_checks
from dream_kernels.problem import Needs, Problem, Reading
from dream_kernels.validation import _geometry
from helpers.agreement import problem_of
from helpers.cases import Case, make_inputs

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from dream_kernels.triton import (
    aot,
    call,
    device,
    launch,
    launcher,
    plan,
    work_list,
)
from dream_kernels.triton.implementation import TritonImplementation

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launches are replaced, and tensors are on the CPU"
)
CASE = Case("host", query_heads=4, key_heads=2, rows=8, prefix=19, local=8, padding=("left",))


def problem_of_case(**changes) -> Problem:
    return make_inputs(replace(CASE, **changes), torch.float32).call(problem_of)


class Compiled(CompiledKernel):
    """Does nothing but to note what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __del__(self) -> None:
        """Nothing was loaded."""

    def __getitem__(self, grid: tuple):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """Stands for a kernel that Triton compiles anew at each call of its own."""

    arg_names = ("q", "tiles", "positions", "M", "scale", "BM")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple):
        def compile_and_launch(*arguments, **options) -> Compiled:
            assert options == {"enable_fp_fusion": True, "num_warps": 4}
            self.compiled.append(Compiled())
            self.compiled[-1].launches.append((grid, arguments))
            return self.compiled[-1]

        return compile_and_launch


def test_a_kernel_is_compiled_once_for_all_that_it_depends_on() -> None:
    kernel, q, tiles = Kernel(), torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    base = {"q": q, "tiles": tiles, "positions": None, "M": 8, "scale": 0.5, "BM": 16, "other": 1}

    def run(grid: tuple = (2, 3, 1), **changes) -> int:
        launcher.run(kernel, grid, {**base, **changes}, num_warps=4)
        return len(kernel.compiled)

    assert run() == run(q=torch.ones(64)) == run(tiles=tiles.clone(), other=2) == 1
    (grid, arguments), *others = kernel.compiled[0].launches
    assert grid == (2, 3, 1) and arguments == (q, tiles, None, 8, 0.5, 16)
    assert len(others) == 2 and others[0][1][0].all() and others[0][1][2:] == arguments[2:]
    changed = (
        {"q": q[1:]}, {"q": q.half()}, {"positions": tiles}, {"M": 16}, {"scale": 0.25}, {"BM": 32},
        {"grid": (3, 2, 1)},
    )  # fmt: skip
    for count, change in enumerate(changed, 2):
        assert run(**change) == run(**change) == count, change


def test_a_kernel_of_the_interpreter_is_not_kept() -> None:
    launched = []
    kernel = type("Interpreted", (), {
        "arg_names": ("q", "M"),
        "__getitem__": lambda self, grid: lambda *arguments, **options: launched.append(grid),
    })()  # fmt: skip
    for _ in range(2):
        launcher.run(kernel, (1,), {"q": torch.zeros(4), "M": 1}, num_warps=4)
    assert launched == [(1,), (1,)]


def test_pointers_come_first_in_every_kernel() -> None:
    kernels = {
        id(v.kernel): v.kernel
        for mode in (True, False)
        for v in aot.variants(64, "hopper", rare=mode)
    }
    assert len(kernels) >= 10
    for kernel in kernels.values():
        known = launcher._Kernel(kernel)
        for name in kernel.arg_names[known.pointers :]:
            assert not aot._POINTERS.get(name, "").startswith(("*", "data")), name


CHANGES = (
    {"query_heads": 2}, {"rows": 7}, {"local": 9}, {"prefix": 20}, {"prefix_batch": 2},
    {"mode": "bias"}, {"document_mass": 0.5}, {"heads": (1,)}, {"per_head_scores": True},
    {"causal": False}, {"padding": ()}, {"scale": 0.3}, {"window": 30}, {"window": 31},
    {"window": 30, "positions": True}, {"softcap": 2.0}, {"sinks": True}, {"head_dim": 32},
    {"spans": ((2, 7),)},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_calls_of_another_form_share_nothing(change: dict) -> None:
    keys = {call._form_key(problem_of_case())}
    keys.add(call._form_key(problem_of_case(**change)))
    assert len(keys) == 2 and call._form_key(problem_of_case()) in keys


def test_strides_and_dtypes_are_part_of_the_form() -> None:
    problem = problem_of_case()
    keys = {call._form_key(problem)}
    for name in ("query", "key", "value", "scores", "prefix_key", "prefix_value"):
        tensor = getattr(problem, name)
        strided = torch.stack([tensor, tensor], -1)[..., 0]
        keys.add(call._form_key(replace(problem, **{name: strided})))
    keys.add(call._form_key(replace(problem, query=problem.query.half())))
    assert len(keys) == 8


@pytest.mark.parametrize("head_dim,dtype,unit", (
    (64, torch.bfloat16, 1), (72, torch.bfloat16, 8), (68, torch.bfloat16, 1),
    (8, torch.float16, 8), (72, torch.float32, 4), (68, torch.float32, 4),
))  # fmt: skip
def test_strides_are_multiples_of_16_bytes_only_if_all_are(
    head_dim: int, dtype: torch.dtype, unit: int
) -> None:
    """Multiples of 16 elements need no unit: Triton is told of them."""
    inputs = make_inputs(replace(CASE, head_dim=head_dim), dtype)
    problem = inputs.call(problem_of)
    known = call.Call(problem)
    assert known.arguments["UNIT"] == known.gradient(inputs.grad_output)["UNIT"] == unit

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]

    assert known.gradient(widened(inputs.grad_output))["UNIT"] == 1
    assert known.gradient(inputs.grad_output, widened(problem.key))["UNIT"] == 1
    for name in ("query", "key", "value", "prefix_key", "prefix_value"):
        other = replace(problem, **{name: widened(getattr(problem, name))})
        assert call.Call(other).arguments["UNIT"] == 1, name


def test_a_form_holds_no_tensor_of_a_call() -> None:
    problem = problem_of_case()
    call.Call(problem)
    (form,) = call._forms.values()
    held = [
        v for v in (*vars(form).values(), *form.numbers.values()) if isinstance(v, torch.Tensor)
    ]
    assert not held


SYNCHRONISES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("mode", ("reweight", "bias"))
def test_nothing_waits_for_the_device_nor_copies_from_the_host(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a CUDA graph is captured neither is possible."""
    problem = problem_of_case(mode=mode)
    for module in (launch, plan):
        monkeypatch.setattr(module, "run", lambda *arguments, **options: None)
    monkeypatch.setattr(device, "captures", lambda on: True)
    implementation, needs = TritonImplementation(), Needs(*[True] * 6, False)
    set_value_checks(False)  # as on a GPU
    try:
        with torch.no_grad(), Operations() as operations:
            mask = problem.mask.view(torch.uint8)
            places = _geometry(problem.spans.int(), mask, None, problem.spans.device)
            output, saved = implementation.forward(problem, needs)
            implementation.backward(problem, output, saved, torch.ones_like(output), needs)
    finally:
        set_value_checks(None)
    assert places[0].shape == problem.spans.shape
    found = operations.names
    assert "empty" in found
    assert not [name for name in found if name.startswith(SYNCHRONISES)]
    # lift_fresh and scalar_tensor are what torch.tensor does with numbers of the host.
    assert not found & {"lift_fresh", "scalar_tensor", "set_"}, found


def test_a_captured_graph_gets_its_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_case(heads=(1, 2))
    outside = call.Call(problem).arguments
    monkeypatch.setattr(device, "captures", lambda on: True)
    captured, again, other = (
        call.Call(p).arguments for p in (problem, problem, replace(problem, reading=Reading()))
    )
    for name in ("table", "n_scored", "scored"):
        assert torch.equal(captured[name], outside[name])
        assert captured[name] is again[name]
        assert len({x[name].data_ptr() for x in (outside, captured, other)}) == 3
    # Another shape needs no other heads, which would be copied from the host.
    monkeypatch.setattr(device, "captures", lambda on: False)
    longer = call.Call(problem_of_case(heads=(1, 2), prefix=20)).arguments
    assert longer["table"] is outside["table"]
    assert outside["scored"].tolist() == [0, 1, 1, 0]
    assert outside["table"].tolist() == [1, 0, 2, 3] and outside["n_scored"].tolist() == [1, 1]


def test_arguments_are_checked_again_where_they_differ_in_type_alone() -> None:
    inputs = make_inputs(replace(CASE, padding=()), torch.float32)
    for good, bad in (
        ({"document_mass": 1.0}, {"document_mass": True}),
        ({"heads": [0, 1]}, {"heads": [False, True]}),
        ({"window": 27}, {"window": 27.0}),
        ({"heads": [0, 1]}, {"heads": [0, 1.0]}),
    ):
        inputs.call(document_attention, impl="reference", **good)
        with pytest.raises((TypeError, ValueError)):
            inputs.call(document_attention, impl="reference", **bad)


def test_weights_kernel_is_launched_once_for_layers_that_share_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []
    monkeypatch.setattr(plan, "run", lambda kernel, *rest, **options: launched.append(kernel))
    problem = problem_of_case()
    made = plan.Plan.of(problem)
    first = made.weights(problem.scores, bias=False)
    assert made.weights(problem.scores.detach(), bias=False) is first
    problem.scores.add_(1.0)
    assert made.weights(problem.scores, bias=False) is not first
    assert made.weights(problem.scores, bias=True) is not first
    assert launched == [work_list.weights_kernel] * 3
