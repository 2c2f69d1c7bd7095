"""Launches kernels: what Triton compiled for a call is found again by all that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

from dream_kernels.triton.device import triton_version

# Parameters that are pointers, in front of all others. Memory that the launches themselves
# allocate begins at a multiple of 16 bytes and has one dtype, other memory is given.
OWN_POINTERS = frozenset((
    "table", "n_scored", "scored", "tiles", "shorts", "rest", "segment", "counts", "weights",
    "order", "places", "columns", "documents", "parts", "partial", "part_o", "part_lse", "dq",
))  # fmt: skip
GIVEN_POINTERS = frozenset((
    "q", "k", "v", "pk", "pv", "o", "o_part", "do", "dk", "dv", "state", "mask", "positions",
    "sinks", "spans", "scores",
))  # fmt: skip
# Calls of so many shapes are kept.
_MOST_KEPT = 4096
# Older ones take the arguments of a compiled kernel in another form.
_KEEPS = triton_version() >= (3, 3)


class _Kernel:
    """A kernel, the order of its arguments, and what was compiled of it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        pointers = [name for name in kernel.arg_names if name in OWN_POINTERS | GIVEN_POINTERS]
        self.pointers = len(pointers)
        if list(kernel.arg_names[: self.pointers]) != pointers:
            raise AssertionError(f"pointers must come first in {kernel.arg_names}")
        self.in_order = itemgetter(*kernel.arg_names)
        self.given = [i for i, name in enumerate(pointers) if name in GIVEN_POINTERS]
        self.compiled: dict[Hashable, Callable[..., None]] = {}


_kernels: dict[int, _Kernel] = {}


def run(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **options: int) -> None:
    """Launch ``kernel`` with those of the ``arguments`` that it has parameters for.

    A parameter's name means the same in every kernel, so that kernels share groups of arguments.
    Triton takes long to find out which compiled kernel serves a call. It depends on the device, on
    the values of all numbers, and on dtype and alignment of the tensors.
    """
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Kernel(kernel)
    values = known.in_order(arguments)
    numbers = values[known.pointers :]
    memory = [
        None if (t := values[i]) is None else (t.data_ptr() & 15, t.dtype) for i in known.given
    ]
    key = (values[0].device, grid, numbers, *options.values(), *memory)
    launch = known.compiled.get(key)
    if launch is not None:
        launch(*values)
        return
    if any(isinstance(value, Tensor) for value in numbers):
        raise AssertionError(f"a tensor is passed as a number of {kernel.arg_names}")
    # Fused multiply-adds are no longer triton's own default in 3.10.
    compiled = kernel[grid](*values, enable_fp_fusion=True, **options)
    # Triton's interpreter, and what stands in for a device, return something else.
    if _KEEPS and isinstance(compiled, CompiledKernel):
        if len(known.compiled) >= _MOST_KEPT:
            known.compiled.clear()
        known.compiled[key] = compiled[(*grid, 1, 1)[:3]]
