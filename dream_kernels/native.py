"""The native extension ``dream_kernels._native``, and calls of it in its own terms."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dream_kernels.problem import Problem

try:
    import dream_kernels._native as _native
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

Array = tuple[int, torch.Size, tuple[int, ...], int, int]


def native_import_error() -> str | None:
    """Return why the native extension cannot be imported, or None when it can."""
    return _import_error


def array(tensor: Tensor) -> Array:
    memory = tensor.untyped_storage()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), memory.data_ptr(), memory.nbytes()


def optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else array(tensor)


@cache
def _heads(heads: tuple[bool, ...]) -> tuple[Array, Tensor]:
    """Which heads receive the scores, in host memory, and the tensor that keeps it alive."""
    tensor = torch.tensor(heads, device="cpu")
    return array(tensor), tensor


def native_problem(problem: Problem) -> _native.Problem:
    return _native.Problem(
        dtype=DTYPES[problem.query.dtype],
        query=array(problem.query),
        key=array(problem.key),
        value=array(problem.value),
        prefix_key=optional(problem.prefix_key),
        prefix_value=optional(problem.prefix_value),
        scores=array(problem.scores),
        spans=array(problem.spans),
        mask=optional(problem.mask),
        positions=optional(problem.positions),
        sinks=optional(problem.sinks),
        heads=_heads(problem.heads)[0],
        mode=problem.mode,
        document_mass=problem.document_mass,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
    )
