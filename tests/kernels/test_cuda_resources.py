"""The CUDA kernels compiled without a GPU, compared with the recorded resources.

``python -m helpers.cuda_resources`` in ``tests/`` renews the record.
"""

from __future__ import annotations

import json

import pytest

from dream_kernels.native import native_import_error

if native_import_error() is not None:
    pytest.skip(
        f"the native extension is not built: {native_import_error()}", allow_module_level=True
    )

from dream_kernels import _native
from helpers.cuda_resources import ARCHS, PARTS, RECORD, cuobjdump, resources

WRITTEN = json.loads(RECORD.read_text())
KERNELS: dict[str, dict[str, int]] = WRITTEN["kernels"]
# Of a block, in bytes.
SHARED_KB = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
# Local loads and stores in a whole kernel; some are outside its loop. Only to be lowered.
MOST_SPILLS = {"query_reweight": 202}
MOST_SPILLS_ELSEWHERE = 25


def test_the_record_has_every_kernel_and_architecture() -> None:
    names = {name.removeprefix("dream_") for name, *_ in _native.cuda_kernels()}
    assert {f"sm_{arch}/{name}" for arch in ARCHS for name in names} == set(KERNELS)


def test_recorded_resources_fit_the_device() -> None:
    for name, row in KERNELS.items():
        target, kernel = name.split("/")
        assert row["shared"] <= SHARED_KB[target.removeprefix("sm_")] * 1024, name
        most = MOST_SPILLS.get("_".join(kernel.split("_")[:2]), MOST_SPILLS_ELSEWHERE)
        assert row["spills"] <= most, name
        with_products = kernel.split("_")[0] in ("forward", "rows", "query", "keys")
        assert (row["tensor"] > 0) == with_products, name


@pytest.mark.skipif(
    _native.cuda_compiler != WRITTEN["nvcc"],
    reason=f"the record is of nvcc {WRITTEN['nvcc']}, the extension of "
    f"{_native.cuda_compiler or 'none'}",
)
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed; triton brings it")
@pytest.mark.parametrize(
    "part", [*PARTS[:2], *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS[2:])]
)
def test_resources_are_those_recorded(part: str) -> None:
    """The driver looks kernels up by name: all of them are there."""
    found = resources(_native.cuda_binary(part))
    names = {n.removeprefix("dream_") for n, of, _, _ in _native.cuda_kernels() if of == part}
    targets = {f"sm_{arch}" for arch in _native.cuda_architectures.split()}
    assert {f"{target}/{name}" for target in targets for name in names} == set(found)
    for name, row in found.items():
        assert row == KERNELS[name], f"{name} has changed: renew the record"
