"""Launches of the CUDA kernels, with a stand-in for the driver that prints what it is asked for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from dream_kernels.native import native_import_error
from helpers.own_process import run_command

if native_import_error() is not None:
    pytest.skip(
        f"the native extension is not built: {native_import_error()}", allow_module_level=True
    )

from dream_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CC", "")) or ["cc"]
KERNELS = {name: (threads, shared) for name, _, threads, shared in _native.cuda_kernels()}

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"{COMPILER[0]} is not installed"
)
needs_binaries = pytest.mark.skipif(
    not _native.cuda_architectures, reason="the extension was built without nvcc"
)

# Nothing reads the tensors: the driver only prints.
CALL = """
import sys
import torch
from dream_kernels import _native, cuda
from dream_kernels.problem import Needs
from helpers.agreement import problem_of
from helpers.cases import Case, make_inputs

mode, splits = sys.argv[1], int(sys.argv[2])
case = Case("driver", batch=3, rows=50, mode=mode, head_dim=128, prefix=300)
problem = make_inputs(case, torch.bfloat16).call(problem_of)
native, stream = cuda.native_problem(problem), 0x1234
needs = Needs(True, True, True, True, True, False, False)
output = torch.empty(problem.output_shape, dtype=torch.bfloat16)
state, plan = cuda.CudaImplementation().empty_saved(problem, needs)
_, partial, backward = _native.cuda_sizes(native, splits)
_native.cuda_forward(
    native, output=cuda.array(output), state=cuda.array(state), plan=cuda.array(plan),
    partial=cuda.array(cuda._bytes(max(partial, 1), output.device)), splits=splits, stream=stream,
)
gradients = cuda._arrays(cuda._empty_gradients(problem, needs))
_native.cuda_backward(
    native, state=cuda.array(state), plan=cuda.array(plan), output=cuda.array(output),
    memory=cuda.array(cuda._bytes(backward, output.device)), grad_output=cuda.array(output),
    splits=splits, stream=stream, **gradients,
)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests" / "native" / "fake_cuda_driver.c"
    target = folder / "libcuda.so.1"
    run_command(*COMPILER, "-shared", "-fPIC", source, "-o", target, check=True)
    return folder


def call(driver: Path, mode: str = "reweight", splits: int = 1, **environment: str):
    return run_command(
        *(sys.executable, "-c", CALL, mode, str(splits)),
        env={
            **os.environ, **environment, "LD_LIBRARY_PATH": str(driver),
            "PYTHONPATH": str(ROOT / "tests"),
        },
    )  # fmt: skip


@needs_compiler
@needs_binaries
def test_a_call_is_these_launches(driver: Path) -> None:
    """A block for each batch element, key head and 64 rows; the prefix's gradients one by one."""
    process = call(driver, "reweight", splits=2)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    launches = [line.split()[1:] for line in lines if line.startswith("launch")]
    grids = [(name.removeprefix("dream_"), *map(int, rest[1:4])) for name, *rest in launches]
    tiles = 324 // 32 + 3 + -(-324 // 32)
    assert grids == [
        ("plan", 3, 1, 1),
        ("forward_reweight_bf16_128", 3 * 2, 2, 3),
        ("combine_reweight_bf16_128", 38, 2, 3),
        ("query_reweight_bf16_128", 5 * 2, 2, 3),
        ("join_reweight_bf16_128", 38, 2, 3),
        ("scores_reweight", 1, 1, 3),
        *[("keys_reweight_bf16_128", tiles, 2, 1)] * 3,
    ]
    for name, *rest in launches:
        threads, shared = KERNELS[name]
        assert " ".join(rest[4:]) == (
            f"threads {threads} 1 1 shared {shared} stream 0x1234 batch 3"
        )
    # Each binary is loaded once, and each kernel may use its shared memory.
    assert [line for line in lines if line.startswith("module")] == ["module ba55ed50"] * 2
    attributes = {line.split()[1]: line.split()[2:] for line in lines if "attribute" in line}
    assert attributes == {name: ["8", str(KERNELS[name][1])] for name, *_ in launches}


@needs_compiler
@needs_binaries
@pytest.mark.parametrize("function", ("cuModuleLoadData", "cuLaunchKernel"))
def test_what_the_driver_refuses_is_raised(driver: Path, function: str) -> None:
    process = call(driver, FAKE_CUDA_FAILS=function)
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert re.search(r"RuntimeError: (cuModuleLoadData|dream_plan) failed: unknown error", last)


@needs_compiler
def test_without_a_driver_the_call_says_so(driver: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    process = call(tmp_path)
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert "the CUDA driver cannot be loaded" in last
