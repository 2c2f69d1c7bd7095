"""The native CPU implementation: hands pointers and strides to ``dream_kernels._native``."""

from __future__ import annotations

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem

try:
    from dream_kernels import _native
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_Array = tuple[int, torch.Size, tuple[int, ...]]


def native_import_error() -> str | None:
    """Return why the native extension cannot be imported, or None when it can."""
    return _import_error


def _array(tensor: Tensor) -> _Array:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _optional(tensor: Tensor | None) -> _Array | None:
    return None if tensor is None else _array(tensor)


def _native_problem(problem: Problem) -> _native.Problem:
    return _native.Problem(
        dtype=_DTYPES[problem.query.dtype],
        query=_array(problem.query),
        key=_array(problem.key),
        value=_array(problem.value),
        prefix_key=_optional(problem.prefix_key),
        prefix_value=_optional(problem.prefix_value),
        scores=_array(problem.scores),
        spans=_array(problem.spans),
        mask=_optional(problem.mask),
        heads=_array(problem.heads),
        mode=problem.mode,
        document_mass=problem.document_mass,
        scale=problem.scale,
        causal=problem.causal,
    )


def _row_tensor(problem: Problem, last: int) -> Tensor:
    """``[B, Hq, M, last]`` in float32."""
    return torch.empty(problem.batch, problem.query_heads, problem.rows, last, dtype=torch.float32)


class CpuImplementation:
    """Blocked C++ for float32, bfloat16 and float16, with sums in float32.

    It runs on ``torch.get_num_threads()`` threads, whose number does not change the results, and
    uses the widest vectors of the machine unless the environment variable
    ``DREAM_KERNELS_CPU_ISA`` (``portable``, ``avx2``, ``avx512``) names others.
    """

    name = "cpu"

    def why_not(self, problem: Problem) -> str | None:
        if _import_error is not None:
            return f"the native extension is not available ({_import_error})"
        device = problem.query.device
        if device.type != "cpu":
            return f"it needs tensors on the CPU, got {device}"
        if problem.query.dtype not in _DTYPES:
            known = ", ".join(_DTYPES.values())
            return f"it supports {known}, got {problem.query.dtype}"
        if problem.head_dim > _native.max_head_dim:
            return f"it supports head sizes up to {_native.max_head_dim}, got {problem.head_dim}"
        return None

    def forward(self, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = torch.empty(problem.query.shape, dtype=problem.query.dtype)
        # Log-sum-exp of each row's logits in every document and, last, outside all of them.
        state = _row_tensor(problem, problem.documents + 1)
        _native.forward(
            _native_problem(problem),
            output=_array(output),
            state=_array(state),
            threads=torch.get_num_threads(),
        )
        return output, (state,)

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        (state,) = saved
        inputs = (
            problem.query, problem.key, problem.value, problem.scores,
            problem.prefix_key, problem.prefix_value,
        )  # fmt: skip
        gradients = Gradients(
            *(
                torch.empty(tensor.shape, dtype=tensor.dtype)
                if needed and tensor is not None
                else None
                for tensor, needed in zip(inputs, needs)
            )
        )
        _native.backward(
            _native_problem(problem),
            state=_array(state),
            grad_output=_array(grad_output),
            query=_optional(gradients.query),
            key=_optional(gradients.key),
            value=_optional(gradients.value),
            scores=_optional(gradients.scores),
            prefix_key=_optional(gradients.prefix_key),
            prefix_value=_optional(gradients.prefix_value),
            threads=torch.get_num_threads(),
        )
        return gradients

    def mass(self, problem: Problem) -> Tensor:
        mass = _row_tensor(problem, problem.documents)
        _native.document_mass(
            _native_problem(problem), mass=_array(mass), threads=torch.get_num_threads()
        )
        return mass
