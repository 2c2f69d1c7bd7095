"""What is specific to the native CPU implementation: threads, instruction sets, the binding."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dream_kernels.cpu import CpuImplementation, native_import_error
from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.reference import ReferenceImplementation
from helpers.agreement import Oracle
from helpers.own_process import run_command

ROOT = Path(__file__).resolve().parents[2]
ALL = Needs(*[True] * 6, sinks=False)
HEADS = torch.tensor([False, True, True, True, True, True])
NOTHING = Needs(*[False] * 7)

needs_native = pytest.mark.skipif(
    native_import_error() is not None,
    reason=f"the native extension is not built: {native_import_error()}",
)


def make_problem(
    *,
    batch: int = 2,
    query_heads: int = 6,
    key_heads: int = 2,
    rows: int = 21,
    local: int = 21,
    prefix: int = 150,
    head_dim: int = 24,
    spans: tuple[tuple[int, int], ...] = ((3, 90), (90, 91), (0, 0), (95, 150)),
    dtype: torch.dtype = torch.float32,
    mode: str = "reweight",
    document_mass: float | None = None,
    prefix_batch: int = 1,
    seed: int = 0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    mask = torch.ones(batch, prefix + local, dtype=torch.bool)
    mask[0, 10:13] = False
    has_prefix = prefix > 0
    return Problem(
        query=normal(batch, query_heads, rows, head_dim),
        key=normal(batch, key_heads, local, head_dim),
        value=normal(batch, key_heads, local, head_dim),
        prefix_key=normal(prefix_batch, key_heads, prefix, head_dim) if has_prefix else None,
        prefix_value=normal(prefix_batch, key_heads, prefix, head_dim) if has_prefix else None,
        scores=normal(batch, 1, len(spans)).float(),
        sinks=None,
        spans=torch.tensor(spans).expand(batch, -1, -1),
        mask=mask,
        positions=None,
        heads=(False,) + (True,) * (query_heads - 1),
        mode=mode,
        document_mass=document_mass,
        scale=head_dim**-0.5,
        causal=True,
    )


def grad_output_of(problem: Problem) -> Tensor:
    # Sixteenths are exact in every dtype, so that the oracle gets the same numbers.
    g = torch.Generator().manual_seed(1)
    sixteenths = torch.randint(-32, 33, problem.query.shape, generator=g)
    return (sixteenths / 16).to(problem.query.dtype)


def run(problem: Problem, needs: Needs = ALL, implementation=None) -> dict[str, Tensor]:
    implementation = implementation or CpuImplementation()
    output, saved = implementation.forward(problem, needs)
    gradients = implementation.backward(problem, output, saved, grad_output_of(problem), needs)
    named = {"output": output, "mass": implementation.mass(problem), **gradients._asdict()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def oracle(problem: Problem, needs: Needs = ALL) -> Oracle:
    """The reference on the same numbers in float64."""
    tensors = ("query", "key", "value", "prefix_key", "prefix_value", "scores")
    given = {name: getattr(problem, name) for name in tensors}
    wide = replace(problem, **{name: t if t is None else t.double() for name, t in given.items()})
    exact = run(wide, needs, ReferenceImplementation())
    del exact["mass"]
    return Oracle(wide, grad_output_of(wide), exact, problem.query.dtype)


def without(needs: Needs, *names: str) -> Needs:
    return needs._replace(**dict.fromkeys(names, False))


@needs_native
@pytest.mark.parametrize("mode", ["reweight", "bias"])
@pytest.mark.parametrize(
    "needs",
    [
        pytest.param(NOTHING._replace(scores=True), id="row blocks in parallel"),
        pytest.param(without(ALL, "prefix_key", "prefix_value"), id="key heads in parallel"),
        pytest.param(ALL, id="shared prefix gradient"),
    ],
)
def test_threads_do_not_change_a_bit(mode: str, needs: Needs) -> None:
    # Large enough that every thread gets work.
    problem = make_problem(mode=mode, batch=3, query_heads=12, key_heads=4, rows=60, local=60)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(run(problem, needs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(result[name], tensor), name


@needs_native
@pytest.mark.parametrize(
    "needs",
    [
        NOTHING._replace(**dict.fromkeys(names, True))
        for names in (
            ("scores",),
            ("query",),
            ("key",),
            ("value",),
            ("prefix_key",),
            ("prefix_value",),
            ("query", "scores"),
            ("key", "prefix_value"),
            ("value", "prefix_key", "scores"),
        )
    ],
    ids=lambda needs: "+".join(n for n, needed in needs._asdict().items() if needed),
)
def test_each_gradient_alone_is_the_one_of_all_together(needs: Needs) -> None:
    problem = make_problem()
    everything = run(problem)
    alone = run(problem, needs)
    assert {n for n in Gradients._fields if n in alone} == {
        n for n, needed in needs._asdict().items() if needed
    }
    for name, tensor in alone.items():
        if needs == NOTHING._replace(scores=True):
            # Forward keeps each document's output, which rounds in other places.
            assert oracle(problem, needs).complaint(name, tensor) is None
        else:
            assert torch.equal(tensor, everything[name]), name


# More keys than a row block keeps between its two sweeps.
LONG = {
    "one document alone is": ((20, 700), (700, 4500), (4600, 4601)),
    "several together are": tuple((450 * i, 450 * i + 440 - i) for i in range(11)),
    "the rest is": ((20, 700), (4600, 4601)),
}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spans", LONG.values(), ids=LONG)
@pytest.mark.parametrize(
    "mode, document_mass", [("reweight", None), ("reweight", 0.5), ("bias", None)]
)
def test_more_keys_than_are_retained(
    mode: str, document_mass: float | None, spans: tuple, dtype: torch.dtype
) -> None:
    problem = make_problem(
        mode=mode, document_mass=document_mass, rows=4, local=64, prefix=5000,
        batch=3, query_heads=4, key_heads=2, spans=spans, dtype=dtype,
    )  # fmt: skip
    expected = oracle(problem)
    expected.check(run(problem))
    for names in (("query", "scores"), ("value",), ("prefix_key",)):
        needs = NOTHING._replace(**dict.fromkeys(names, True))
        part = run(problem, needs)
        assert part.keys() == {"output", "mass", *names}
        for name, tensor in part.items():
            assert expected.complaint(name, tensor) is None


INSTRUCTION_SET_SCRIPT = """
import sys, torch
from test_cpu_native import make_problem, run
from dream_kernels import _native
results = [run(make_problem(head_dim=d, dtype=t)) for d in (24, 80, 256)
           for t in (torch.float32, torch.bfloat16, torch.float16)]
torch.save((_native.instruction_set(), results), sys.argv[1])
"""


def instruction_set() -> str:
    from dream_kernels import _native

    return _native.instruction_set()


def run_with_instruction_set(name: str, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "kernels"), *sys.path])
    return run_command(
        *(sys.executable, *arguments),
        env={**os.environ, "DREAM_KERNELS_CPU_ISA": name, "PYTHONPATH": path},
    )


@needs_native
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_agrees_with_the_reference(name: str, tmp_path: Path) -> None:
    file = tmp_path / "results.pt"
    process = run_with_instruction_set(name, "-c", INSTRUCTION_SET_SCRIPT, str(file))
    if "DREAM_KERNELS_CPU_ISA must be one of" in process.stderr:
        pytest.skip(f"this machine has no {name}")
    assert process.returncode == 0, process.stderr
    used, results = torch.load(file)
    assert used == name
    for head_dim in (24, 80, 256):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            oracle(make_problem(head_dim=head_dim, dtype=dtype)).check(results.pop(0))


@needs_native
def test_unknown_instruction_set_is_an_error_that_names_the_known_ones() -> None:
    script = "from dream_kernels import _native; _native.instruction_set()"
    process = run_with_instruction_set("sse9", "-c", script)
    assert process.returncode != 0
    assert re.search(r'ValueError: DREAM_KERNELS_CPU_ISA .*portable.*"sse9"', process.stderr)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_survives(dtype: torch.dtype) -> None:
    # A row that sees one key returns its value, so the output shows both conversions.
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    value = bits.view(dtype).reshape(1, 1, 256, 256)
    problem = replace(
        make_problem(batch=1, query_heads=1, key_heads=1, prefix=0, rows=1, local=1,
                     head_dim=256, spans=((0, 0),), dtype=dtype),
        mask=None,
    )  # fmt: skip
    for row in range(256):
        single = value[:, :, row : row + 1]
        if dtype == torch.bfloat16 and instruction_set() == "avx512_bf16":
            # The machine's bfloat16 dot products take subnormal numbers as 0.
            single = torch.where(single.abs() < torch.finfo(dtype).tiny, 0, single)
        output, _ = CpuImplementation().forward(replace(problem, value=single), NOTHING)
        assert torch.equal(output.isnan(), single.isnan())
        assert torch.equal(output.nan_to_num(1, 2, 3), single.nan_to_num(1, 2, 3))


@needs_native
def test_rounding_to_half_precision_is_that_of_torch() -> None:
    # Means of two values fall between representable numbers, ties and subnormals included.
    for dtype, smallest in ((torch.float16, -26), (torch.bfloat16, -40)):
        g = torch.Generator().manual_seed(0)
        exponent = torch.randint(smallest, 15, (1, 1, 2, 256), generator=g)
        mantissa = 1 + torch.randint(0, 128, (1, 1, 2, 256), generator=g) / 128
        value = torch.ldexp(mantissa, exponent).to(dtype)
        problem = replace(
            make_problem(batch=1, query_heads=1, key_heads=1, prefix=0, rows=1, local=2,
                         head_dim=256, spans=((0, 0),), dtype=dtype),
            value=value, query=torch.zeros(1, 1, 1, 256, dtype=dtype), mask=None,
        )  # fmt: skip
        output, _ = CpuImplementation().forward(problem, NOTHING)
        assert torch.equal(output, value.float().mean(2, keepdim=True).to(dtype))


@needs_native
def test_any_strides_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(prefix_batch=2)
    expected = run(problem)
    expanded = make_problem(prefix_batch=1)
    expected_expanded = run(expanded, without(ALL, "prefix_key", "prefix_value"))

    def every_second(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1).flatten(-2)[..., ::2]

    def heads_last(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    strided = replace(
        problem,
        query=heads_last(problem.query),
        key=every_second(problem.key),
        value=problem.value.transpose(2, 3).contiguous().transpose(2, 3),
        prefix_key=heads_last(problem.prefix_key),
        prefix_value=every_second(problem.prefix_value),
        scores=every_second(problem.scores),
        spans=problem.spans.transpose(0, 2).contiguous().transpose(0, 2),
        mask=torch.stack([problem.mask, ~problem.mask], -1)[..., 0],
    )
    wide = replace(
        expanded,
        prefix_key=expanded.prefix_key.expand(2, -1, -1, -1),
        prefix_value=expanded.prefix_value.expand(2, -1, -1, -1),
    )

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was copied")

    for name in ("contiguous", "clone", "reshape", "repeat_interleave"):
        monkeypatch.setattr(Tensor, name, refuse)
    for name, tensor in run(strided).items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in run(wide, without(ALL, "prefix_key", "prefix_value")).items():
        assert torch.equal(tensor, expected_expanded[name]), name


@needs_native
@pytest.mark.parametrize("mode", ["reweight", "bias"])
def test_nan_in_the_input_shows_in_the_output(mode: str) -> None:
    # Clamping in the exponential must not turn a NaN logit into a number.
    problem = make_problem(mode=mode)
    problem.query[1, 2, 3, 4] = torch.nan
    output, _ = CpuImplementation().forward(problem, NOTHING)
    expected = torch.zeros(output.shape, dtype=torch.bool)
    expected[1, 2, 3] = True
    assert torch.equal(output.isnan(), expected)


@needs_native
@pytest.mark.parametrize("mode", ["reweight", "bias"])
def test_document_with_score_minus_infinity_gets_no_weight(mode: str) -> None:
    problem = make_problem(mode=mode)
    problem.scores[:, :, 1] = -torch.inf
    low = replace(problem, scores=problem.scores.clamp(min=-1e4))
    for (name, got), expected in zip(run(problem).items(), run(low).values()):
        assert torch.equal(got, expected), name


@needs_native
@pytest.mark.parametrize(
    "change, reason",
    [
        pytest.param({"dtype": torch.float64}, "float64", id="dtype"),
        pytest.param({"head_dim": 257}, "257", id="head size"),
    ],
)
def test_why_not_names_what_is_not_supported(change: dict, reason: str) -> None:
    assert CpuImplementation().why_not(make_problem()) is None
    assert reason in str(CpuImplementation().why_not(make_problem(**change)))


def as_array(tensor: Tensor) -> tuple:
    memory = tensor.untyped_storage()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), memory.data_ptr(), memory.nbytes()


def native_arguments(problem: Problem) -> dict:
    names = ("query", "key", "value", "prefix_key", "prefix_value", "scores", "spans", "mask")
    arrays = {name: as_array(getattr(problem, name)) for name in names}
    return {
        **arrays, "heads": as_array(HEADS), "dtype": "float32", "mode": "reweight",
        "document_mass": None, "scale": 1.0, "causal": True, "positions": None, "sinks": None,
        "window": None, "softcap": None,
    }  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    "name, change, message",
    [
        ("dtype", "int8", "dtype"),
        ("mode", "other", "mode"),
        ("document_mass", 1.5, "document_mass"),
        ("scale", float("inf"), "scale"),
        ("query", torch.zeros(2, 6, 21), "query must have 4 dimensions"),
        ("query", torch.zeros(2, 5, 21, 24), "key must have a number of heads"),
        ("value", torch.zeros(2, 2, 20, 24), "value must have shape"),
        ("prefix_key", None, "prefix_key and prefix_value"),
        ("prefix_key", torch.zeros(3, 2, 150, 24), "prefix_key must have batch"),
        ("prefix_value", torch.zeros(1, 2, 149, 24), "prefix_value must have shape"),
        ("scores", torch.zeros(2, 3, 4), "scores must have shape"),
        ("spans", torch.zeros(2, 0, 2, dtype=torch.long), "spans must name"),
        ("mask", torch.ones(2, 170, dtype=torch.bool), "mask must have shape"),
        ("heads", torch.ones(5, dtype=torch.bool), "heads must have shape"),
        ("positions", torch.zeros(2, 171, dtype=torch.long), "positions need a window"),
        ("sinks", torch.zeros(5), "sinks must have shape"),
        ("window", 0, "window must be at least 1"),
        ("softcap", 0.0, "softcap must be positive and finite"),
        ("softcap", float("inf"), "softcap must be positive and finite"),
        ("key", (0, (2, 2, 21, 24), (1008, 504, 24, 1), 0, 8064), "key must have a non-null"),
        ("key", (2, (2, 2, 21, 24), (1008, 504, 24, 1), 0, 8066), "key must have .* aligned"),
    ],
)
def test_binding_refuses_a_wrong_problem(name: str, change: object, message: str) -> None:
    from dream_kernels import _native

    problem = make_problem()
    arguments = native_arguments(problem)
    arguments[name] = as_array(change) if isinstance(change, Tensor) else change
    with pytest.raises(ValueError, match=message):
        _native.Problem(**arguments)


@needs_native
@pytest.mark.parametrize(
    "spans, message",
    [
        (((3, 9), (8, 12)), "disjoint"),
        (((3, 9), (170, 172)), "0 <= start <= end <= 171"),
        (((-1, 9),), "0 <= start"),
        (((9, 3),), "0 <= start"),
    ],
)
def test_binding_refuses_spans_that_leave_the_keys_or_overlap(
    spans: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CpuImplementation().forward(make_problem(spans=spans), NOTHING)


@needs_native
def test_binding_refuses_wrong_outputs() -> None:
    from dream_kernels import _native

    problem = make_problem()
    native = _native.Problem(**native_arguments(problem))
    output, state = torch.zeros(problem.query.shape), torch.zeros(2, 6, 21, 5)

    def forward(output: Tensor = output, state: Tensor = state, kept: tuple | None = None,
                threads: int = 1) -> None:  # fmt: skip
        _native.forward(
            native, output=as_array(output), state=as_array(state), segment_outputs=kept,
            threads=threads,
        )  # fmt: skip

    forward()
    with pytest.raises(ValueError, match="segment_outputs must have shape"):
        forward(kept=as_array(torch.zeros(2, 6, 21, 24)))
    with pytest.raises(ValueError, match="output must have shape"):
        forward(output=output[:, :5])
    with pytest.raises(ValueError, match="must not overlap itself"):
        forward(output=output[:1].expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="state must be contiguous"):
        forward(state=torch.zeros(2, 6, 5, 21).transpose(2, 3))
    with pytest.raises(ValueError, match="threads must be at least 1"):
        forward(threads=0)


def test_native_sources_include_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for source in sources:
        includes = re.findall(r"#\s*include\s*[<\"](.*)[>\"]", source.read_text())
        assert not [i for i in includes if re.match(r"(torch|ATen|c10|caffe2)/", i)], source


@pytest.mark.parametrize(
    "compiler, message",
    [
        ("/nowhere/c++", r'"/nowhere/c\+\+" was not found; install g\+\+'),
        ("false", "needs a C.*17 compiler, and false is none"),
    ],
)
def test_setup_without_a_compiler_says_so_in_one_line(
    compiler: str, message: str, tmp_path: Path
) -> None:
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module, reason=f"setup.py needs {module}")
    process = run_command(
        *(sys.executable, "setup.py", "--quiet", "build_ext"),
        *("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"),
        cwd=ROOT,
        env={**os.environ, "CXX": compiler},
    )
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("error: dream-kernels")
    assert re.search(message, last)
