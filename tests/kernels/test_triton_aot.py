"""The Triton kernels compiled without their devices, compared with the recorded resources.

The record is renewed by
``python -m dream_kernels.triton.aot --write tests/kernels/triton_resources.json``.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import dream_kernels
from helpers.own_process import run_command

triton = pytest.importorskip("triton", reason="triton is not installed")

from dream_kernels.triton.sass import Loop, loops, serialisation

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
RECORD = json.loads((HERE / "triton_resources.json").read_text())
KERNELS: dict[str, dict] = RECORD["kernels"]
# The kernels and tile shapes whose products ptxas is known to serialise. Only to be made shorter.
SERIALISED = (HERE / "triton_serialised.txt").read_text().split()
HOPPER = "sm_90"
# The head sizes of the record; on Hopper it has every tile shape, and counts the loops.
COUNTED = (64, 128)
SHARED_KB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64,
}  # fmt: skip
# Devices that tile shapes were chosen for, and others that use the same shapes.
MAIN, OTHERS = ("sm_80", "sm_90", "sm_100"), ("sm_86", "sm_89", "gfx942")
INSTRUCTIONS = {
    "sm_80": {"mma.sync"},
    "sm_86": {"mma.sync"},
    "sm_89": {"mma.sync"},
    "sm_90": {"wgmma.mma_async"},
    # Triton uses tcgen05 for some of the products and mma.sync for others.
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "gfx942": {"v_mfma"},
}
SOURCES = sorted((Path(dream_kernels.__file__).parent / "triton").glob("*.py"))
# Kernels that multiply tiles; the others read and add.
WITH_PRODUCTS = ("forward", "documents", "query", "keys", "mass")

same_triton = pytest.mark.skipif(
    triton.__version__ != RECORD["triton"],
    reason=f"the record is of triton {RECORD['triton']}, this is {triton.__version__}",
)


def split_name(name: str) -> tuple[str, int, str]:
    target, head_dim, kernel = name.split("/")
    return target, int(head_dim), kernel


@pytest.mark.parametrize("target", MAIN)
def test_the_record_has_every_kernel(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on Hopper every tile shape."""
    from dream_kernels.triton import device
    from dream_kernels.triton.aot import family_of_target, variants

    monkeypatch.setattr(device, "interpreted", lambda: False)  # which has a tile shape of its own
    for head_dim in COUNTED:
        prefix = f"{target}/{head_dim}/"
        every_tile = target == HOPPER
        recorded = {name.removeprefix(prefix) for name in KERNELS if name.startswith(prefix)}
        assert recorded == {
            variant.name
            for variant in variants(head_dim, family_of_target(target), every_tile=every_tile)
        }


def test_recorded_resources_fit_the_device() -> None:
    for name, row in KERNELS.items():
        target, head_dim, kernel = split_name(name)
        assert row["shared"] <= SHARED_KB[target] * 1024, name
        # The first tile shape of a list; the others are taken where they are measured to be faster.
        if head_dim in (64, 128) and target in MAIN and ":" not in kernel:
            assert row["spills"] == 0, name
        if kernel.split("-")[0].partition(":")[0] in WITH_PRODUCTS:
            assert INSTRUCTIONS[target] & row["tensor_cores"].keys(), name


def test_no_more_kernels_are_serialised_than_known() -> None:
    """Delete a line of the list when its kernel is mended, and renew the record."""
    found = [name for name in KERNELS if KERNELS[name].get("serialised")]
    assert not set(found) - set(SERIALISED), "ptxas serialises more kernels"
    assert not set(SERIALISED) - set(found), "these are serialised no longer: shorten the list"


def test_waits_show_what_ptxas_says() -> None:
    """A serialised kernel waits for each product; any other not for each."""
    differing = []
    for name, row in KERNELS.items():
        found = [Loop(*values) for values in row.get("loops", ())]
        found = [loop for loop in found if loop.hgmma > 1]
        waits = [loop.waits >= loop.hgmma for loop in found]
        if found and (all(waits) if name in SERIALISED else any(waits)) != (name in SERIALISED):
            differing.append(name)
        assert all(loop.mufu and loop.loads and loop.function for loop in found), name
    assert not differing


SASS = """
        //## File "/a/dream_kernels/triton/forward_walk.py", line {line}
.L_x_1:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   MUFU.EX2 R1, R1 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_loops_are_read_off_the_machine_code() -> None:
    (function,) = (
        f for path in SOURCES if path.name == "forward_walk.py" for f in jit_functions(path)
        if f.name == "plain_keys"
    )  # fmt: skip
    (loop,) = loops(SASS.format(line=function.lineno + 5))
    assert loop == Loop(
        "plain_keys", instructions=9, conditional=2, hgmma=2, tensor_cycles=96, waits=1, mufu=1,
        barriers=1, loads=1, shared=0,
    )  # fmt: skip


def test_serialisation_is_read_off_ptxas() -> None:
    note = "(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    assert serialisation(f"ptxas info : {note} non wgmma\nptxas info : Used 9 registers") == [
        "C7514"
    ]
    assert serialisation("ptxas info : (C7508) another note\n") == []


@pytest.fixture(scope="module")
def kept_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache, kept between test runs.

    Its keys are digests of the kernels' sources with all that they call, of signature, options and
    target, and of Triton with its ptxas; the resources are read off the machine code in it.
    """
    try:
        return request.config.cache.mkdir("triton")
    except (AttributeError, OSError):  # without pytest's cache, or where it cannot be written
        return tmp_path_factory.mktemp("triton")


@pytest.fixture
def resources(kept_cache: Path, tmp_path: Path) -> Callable[..., dict]:
    return partial(compile_for, kept_cache, tmp_path / "report.json")


def compile_for(
    cache: Path,
    report: Path,
    target: str,
    head_dim: int,
    kernels: tuple[str, ...],
    *more: str,
    tiles: tuple[str, ...] = ("--first-tile",),
) -> dict:
    # In its own process: here the kernels may belong to the interpreter.
    command = [sys.executable, "-m", "dream_kernels.triton.aot", f"--head-dim={head_dim}"]
    command += [f"--target={target}", *tiles, *more]
    command += [f"--kernel={kernel}" for kernel in kernels]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    run_command(*command, f"--write={report}", check=True, env=environment)
    return json.loads(report.read_text())["kernels"]


def recorded(target: str, head_dim: int, *kernels: str) -> Any:
    """What is compiled apart from ``make test``, as every slow test of this file."""
    return pytest.param(target, head_dim, kernels, marks=pytest.mark.slow)


@same_triton
@pytest.mark.parametrize(
    "target,head_dim,kernels",
    [
        ("sm_90", 64, ("forward-reweight", "list-documents", "list-keys", "keys-reweight")),
        recorded("sm_90", 64, "both-reweight", "coefficients-reweight", "combine-reweight"),
        recorded("sm_90", 128, "forward-reweight", "both-reweight", "documents-reweight"),
        recorded("sm_80", 64, "forward-reweight", "list-documents", "list-keys"),
        recorded("sm_100", 64, "forward-bias"),
    ],
)
def test_resources_are_those_recorded(
    resources: Callable[..., dict], target: str, head_dim: int, kernels: tuple[str, ...]
) -> None:
    found = resources(target, head_dim, kernels)
    assert len(found) == len(kernels)
    for name, row in found.items():
        assert row == KERNELS[name], (
            f"{name} has changed: renew the record, see the file's docstring"
        )


@same_triton
@pytest.mark.soak
@pytest.mark.parametrize("head_dim", COUNTED)
def test_every_tile_shape_is_as_recorded(kept_cache: Path, tmp_path: Path, head_dim: int) -> None:
    """Waits and all, for every kernel on Hopper: a quarter of an hour for each head size."""
    found = compile_for(kept_cache, tmp_path / "report.json", HOPPER, head_dim, (), tiles=())
    assert len(found) > 40
    assert found == {name: KERNELS[name] for name in found}


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[pytest.mark.slow] if "sm" in t else []) for t in OTHERS]
)
def test_compiles_for_other_devices(resources: Callable[..., dict], target: str) -> None:
    (row,) = resources(target, 128, ("documents-reweight",)).values()
    assert row["shared"] <= SHARED_KB[target] * 1024
    assert INSTRUCTIONS[target] & row["tensor_cores"].keys()


@same_triton
@pytest.mark.slow
def test_rows_of_any_multiple_of_16_bytes_are_loaded_as_wide_as_others(
    resources: Callable[..., dict],
) -> None:
    """Triton knows by itself of strides that are multiples of 16 elements alone."""
    (row,) = resources(HOPPER, 72, ("documents-reweight",)).values()
    padded = KERNELS[f"{HOPPER}/128/documents-reweight"]
    assert row["tile"] == padded["tile"]
    loads = [[Loop(*values).loads for values in each["loops"]] for each in (row, padded)]
    assert loads[0] == loads[1]


def rare(target: str, *kernels: str, dtype: str = "bfloat16", slow: bool = False) -> Any:
    marks = [pytest.mark.slow] if slow else []
    name = f"{target}-{dtype}-{'more' if slow else kernels[0]}"
    return pytest.param(target, dtype, kernels, id=name, marks=marks)


@pytest.mark.parametrize(
    "target,dtype,kernels",
    (
        rare(HOPPER, "forward-reweight", slow=True),
        rare(
            "sm_80", "query-reweight-fold", "documents-bias-split", "keys-reweight",
            "forward-reweight", "forward-bias-fold", "mass", "combine-reweight",
            "coefficients-reweight", "join", "list-documents", "list-keys", "weights", slow=True,
        ),
        rare("sm_80", "forward-reweight", "coefficients-reweight", dtype="float32", slow=True),
    ),
)  # fmt: skip
def test_compiles_with_the_rare_options(
    resources: Callable[..., dict], target: str, dtype: str, kernels: tuple[str, ...]
) -> None:
    """Padding, no causal mask, scores per head, fixed mass, and whatever else the record lacks."""
    found = resources(target, 64, kernels, "--rare", f"--dtype={dtype}")
    assert len(found) == len(kernels)
    for row in found.values():
        assert row["shared"] <= SHARED_KB[target] * 1024
        assert not row.get("serialised"), "ptxas makes each product wait"


def jit_functions(path: Path) -> list[ast.FunctionDef]:
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


def test_device_functions_take_each_variable_at_the_parameter_of_its_name() -> None:
    """Arguments are many and passed by position, since triton 3.2 knows no tuples of them."""
    everywhere = {function.name: function for path in SOURCES for function in jit_functions(path)}
    checked, misplaced = 0, []
    for path in SOURCES:
        known = {**everywhere, **{function.name: function for function in jit_functions(path)}}
        calls = [
            node
            for function in jit_functions(path)
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        for call in calls:
            if call.func.id not in known:
                continue
            parameters = [argument.arg for argument in known[call.func.id].args.args]
            checked += 1
            if len(call.args) != len(parameters):
                misplaced.append(f"{path.name}:{call.lineno}: {len(call.args)} arguments")
            misplaced += [
                f"{path.name}:{call.lineno}: {argument.id} is passed as {parameter}"
                for parameter, argument in zip(parameters, call.args)
                if isinstance(argument, ast.Name)
                and argument.id in parameters
                and argument.id != parameter
            ]
    assert checked > 100
    assert not misplaced
