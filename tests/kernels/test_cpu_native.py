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

from dream_kernels import reference
from dream_kernels.cpu import CpuImplementation, native_import_error
from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.reference import ReferenceImplementation
from dream_kernels.spans import document_of_key
from helpers.agreement import Oracle
from helpers.own_process import run_command

ROOT = Path(__file__).resolve().parents[2]
ALL = Needs(*[True] * 6, sinks=False)
WITH_SINKS = Needs(*[True] * 7)
# Nobody has checked that the window reaches the documents: scored rows see them anyway.
OPTIONS = {"window": 40, "positions": "restart", "softcap": 1.5, "sinks": True}
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
    window: int | None = None,
    positions: str | None = None,
    softcap: float | None = None,
    sinks: bool = False,
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
        sinks=normal(query_heads).float() if sinks else None,
        spans=torch.tensor(spans).expand(batch, -1, -1),
        mask=mask,
        positions=make_positions(positions, batch, prefix, local, g) if positions else None,
        heads=(False,) + (True,) * (query_heads - 1),
        mode=mode,
        document_mass=document_mass,
        scale=head_dim**-0.5,
        causal=True,
        window=window,
        softcap=softcap,
    )


def make_positions(kind: str, batch: int, prefix: int, local: int, g: torch.Generator) -> Tensor:
    """``[B, T]``: as of documents read alone, or in another order that a caller may give."""
    place = torch.arange(prefix + local).expand(batch, -1).clone()
    if kind == "descending":
        return 10_000 - place
    if kind == "random":
        return torch.randint(0, prefix + local, place.shape, generator=g)
    # Anew every 30 keys; then the local keys count on, in each batch element from elsewhere.
    place[:, :prefix] %= 30
    place[:, prefix:] += 30 - prefix + torch.arange(batch)[:, None]
    if kind == "beyond 32 bits":
        place += 2**40
        place[:, : prefix // 2] -= 2**41
    if kind == "apart":  # the batch elements differ in the prefix, too
        place[:, :prefix] += torch.arange(batch)[:, None]
    return place


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
    tensors = ("query", "key", "value", "prefix_key", "prefix_value", "scores", "sinks")
    given = {name: getattr(problem, name) for name in tensors}
    wide = replace(problem, **{name: t if t is None else t.double() for name, t in given.items()})
    exact = run(wide, needs, ReferenceImplementation())
    del exact["mass"]
    return Oracle(wide, grad_output_of(wide), exact, problem.query.dtype)


def without(needs: Needs, *names: str) -> Needs:
    return needs._replace(**dict.fromkeys(names, False))


@needs_native
@pytest.mark.parametrize(
    "mode, options", [("reweight", {}), ("reweight", OPTIONS), ("bias", {}), ("bias", OPTIONS)]
)
@pytest.mark.parametrize(
    "needs",
    [
        pytest.param(NOTHING._replace(scores=True), id="row blocks in parallel"),
        pytest.param(without(ALL, "prefix_key", "prefix_value"), id="key heads in parallel"),
        pytest.param(ALL, id="shared prefix gradient"),
    ],
)
def test_threads_do_not_change_a_bit(mode: str, options: dict, needs: Needs) -> None:
    # Large enough that every thread gets work.
    problem = make_problem(
        mode=mode, batch=3, query_heads=12, key_heads=4, rows=60, local=60, **options
    )
    needs = needs._replace(sinks=bool(options))
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
            ("sinks",),
            ("scores", "sinks"),
        )
    ],
    ids=lambda needs: "+".join(n for n, needed in needs._asdict().items() if needed),
)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=("plain", "options"))
def test_each_gradient_alone_is_the_one_of_all_together(options: dict, needs: Needs) -> None:
    if needs.sinks and not options:
        options = {"sinks": True}
    problem = make_problem(**options)
    everything = run(problem, WITH_SINKS if problem.sinks is not None else ALL)
    alone = run(problem, needs)
    assert {n for n in Gradients._fields if n in alone} == {
        n for n, needed in needs._asdict().items() if needed
    }
    for name, tensor in alone.items():
        if needs == NOTHING._replace(scores=True) and name != "mass":
            # Forward keeps each document's output, which rounds in other places.
            assert oracle(problem, needs).complaint(name, tensor) is None
        else:
            assert torch.equal(tensor, everything[name]), name


@needs_native
@pytest.mark.parametrize("mode, document_mass", [("reweight", 0.5), ("bias", None)])
@pytest.mark.parametrize("rows", [3, 21], ids=("batch elements together", "each alone"))
@pytest.mark.parametrize(
    "positions", [None, "restart", "apart", "descending", "random", "beyond 32 bits"]
)
def test_windows_by_any_positions(
    positions: str | None, rows: int, mode: str, document_mass: float | None
) -> None:
    """Scored rows have the documents however far they are: here nobody has checked the window."""
    for window in (1, 25, 2**62):
        problem = make_problem(
            mode=mode, document_mass=document_mass, batch=3, query_heads=4, rows=rows, local=rows,
            window=window, positions=positions, sinks=True,
        )  # fmt: skip
        results = run(problem, WITH_SINKS)
        del results["mass"]
        oracle(problem, WITH_SINKS).check(results)
        # The masses are those of plain attention, whatever the heads.
        plain = replace(problem, heads=(False,) * 4)
        exact = Oracle(plain, grad_output_of(plain), {}, torch.float32).analysis.mass[..., :-1]
        assert (CpuImplementation().mass(problem) - exact).abs().max() < 1e-5


@needs_native
@pytest.mark.parametrize("positions", [None, "restart"])
def test_keys_beyond_every_window_are_not_read(positions: str | None) -> None:
    """A key that is only masked would spoil the sums: 0 times NaN is NaN."""
    spans = ((0, 0), (150, 160))
    problem = make_problem(
        window=12, positions=positions, spans=spans, prefix_batch=2, softcap=2.0, sinks=True
    )
    near = visible_keys(problem)
    assert 0 < near.sum() < near.numel() / 2
    expected = run(problem, WITH_SINKS)
    far = ~near[:, None, :, None]
    for name in ("key", "value"):
        prefix, local = getattr(problem, f"prefix_{name}"), getattr(problem, name)
        prefix.masked_fill_(far[:, :, :150], torch.nan)
        local.masked_fill_(far[:, :, 150:], torch.nan)
    for name, tensor in run(problem, WITH_SINKS).items():
        assert torch.equal(tensor, expected[name]), name


def visible_keys(problem: Problem) -> Tensor:
    """``[B, T]``: the keys that some row sees."""
    of_key = document_of_key(problem.spans, problem.total_length)
    return reference._visible(problem, of_key[:, None, None]).any(2).any(1)


@needs_native
@pytest.mark.parametrize("mode", ["reweight", "bias"])
def test_options_that_change_nothing(mode: str) -> None:
    """Not a bit; a soft cap far above the logits is left out of that."""
    without_options = run(make_problem(mode=mode))
    problem = make_problem(mode=mode, window=171, sinks=True)
    problem.sinks.fill_(-torch.inf)
    results = run(problem, WITH_SINKS)
    assert torch.equal(results.pop("sinks"), torch.zeros(6))
    for name, tensor in results.items():
        assert torch.equal(tensor, without_options[name]), name
    for softcap in (1e4, 1e30, 1e300):
        for name, tensor in run(make_problem(mode=mode, softcap=softcap)).items():
            torch.testing.assert_close(tensor, without_options[name])


@needs_native
def test_the_soft_cap_is_exact_at_every_size_of_logits() -> None:
    """A row that sees two keys, of logits x and 0, gives their softmax."""
    x = torch.cat([torch.logspace(-30, 30, 400), torch.linspace(0.4, 12, 400)])
    x = torch.cat([x, -x])
    rows = len(x)
    problem = replace(
        make_problem(batch=rows, query_heads=1, key_heads=1, prefix=0, rows=1, local=2,
                     head_dim=1, spans=((0, 0),), softcap=3.0),
        mask=None, scale=1.0, query=x.view(rows, 1, 1, 1),
        key=torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(rows, -1, -1, -1),
        value=torch.tensor([1.0, -1.0]).view(1, 1, 2, 1).expand(rows, -1, -1, -1),
    )  # fmt: skip
    needs = NOTHING._replace(query=True)
    output, saved = CpuImplementation().forward(problem, needs)
    one = torch.ones_like(output)
    grad = CpuImplementation().backward(problem, output, saved, one, needs).query
    wide = x.double().requires_grad_()
    expected = torch.tanh(3 * torch.tanh(wide / 3) / 2)
    expected.sum().backward()
    error = (output.flatten() - expected.detach()).abs()
    assert (error <= 1e-6 * expected.detach().abs() + 1e-7).all()
    assert grad is not None and wide.grad is not None
    # Relative, however close the cap is; below that float32 has no such exponential.
    near = wide.detach().abs() < 30
    error = (grad.flatten() - wide.grad).abs() / wide.grad.clamp(min=1e-9)
    assert error[near].max() < 1e-5
    assert grad.isfinite().all()


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
    "mode, document_mass, options",
    [
        ("reweight", None, {}),
        ("reweight", 0.5, {}),
        ("bias", None, {}),
        ("reweight", None, {"softcap": 1.5, "sinks": True}),
        ("bias", None, {"sinks": True}),
    ],
)
def test_more_keys_than_are_retained(
    mode: str, document_mass: float | None, options: dict, spans: tuple, dtype: torch.dtype
) -> None:
    problem = make_problem(
        mode=mode, document_mass=document_mass, rows=4, local=64, prefix=5000,
        batch=3, query_heads=4, key_heads=2, spans=spans, dtype=dtype, **options,
    )  # fmt: skip
    needs = ALL._replace(sinks=bool(options))
    expected = oracle(problem, needs)
    expected.check(run(problem, needs))
    more = (("sinks",), ("query", "sinks")) if options else ()
    for names in (("query", "scores"), ("value",), ("prefix_key",), *more):
        needs = NOTHING._replace(**dict.fromkeys(names, True))
        part = run(problem, needs)
        assert part.keys() == {"output", "mass", *names}
        for name, tensor in part.items():
            assert expected.complaint(name, tensor) is None


INSTRUCTION_SET_SCRIPT = """
import sys, torch
from test_cpu_native import OPTIONS, WITH_SINKS, make_problem, run
from dream_kernels import _native
results = [run(make_problem(head_dim=d, dtype=t)) for d in (24, 80, 256)
           for t in (torch.float32, torch.bfloat16, torch.float16)]
results.append(run(make_problem(**OPTIONS), WITH_SINKS))
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
    (with_options,) = results
    del with_options["mass"]
    oracle(make_problem(**OPTIONS), WITH_SINKS).check(with_options)


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
