"""The native CPU implementation: hands pointers and strides to ``dream_kernels._native``."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem

try:
    import dream_kernels._native as _native
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# If only the scores need a gradient, as in the first injected layer of a frozen reader, forward
# keeps the output of every document, up to this size: the backward then reads no key. Sums are
# rounded in other places, so the output differs in its last bits.
SEGMENT_OUTPUT_BYTES = 32 << 20

_ONLY_SCORES = Needs(False, False, False, True, False, False, False)

_Array = tuple[int, torch.Size, tuple[int, ...], int, int]


def native_import_error() -> str | None:
    """Return why the native extension cannot be imported, or None when it can."""
    return _import_error


def _array(tensor: Tensor) -> _Array:
    memory = tensor.untyped_storage()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), memory.data_ptr(), memory.nbytes()


@cache
def _heads(heads: tuple[bool, ...]) -> tuple[_Array, Tensor]:
    """Which heads receive the scores, in memory, and the tensor that keeps the memory."""
    tensor = torch.tensor(heads)
    return _array(tensor), tensor


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
        positions=_optional(problem.positions),
        sinks=_optional(problem.sinks),
        heads=_heads(problem.heads)[0],
        mode=problem.mode,
        document_mass=problem.document_mass,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
    )


def _row_tensor(problem: Problem, last: int) -> Tensor:
    """``[B, Hq, M, last]`` in float32."""
    shape = (*problem.query.shape[:3], last)
    return torch.empty(shape, dtype=torch.float32, device=problem.query.device)


class CpuImplementation:
    """Blocked C++ for float32, bfloat16 and float16, with sums in float32.

    It runs on ``torch.get_num_threads()`` threads, whose number does not change the results, and
    uses the widest vectors of the machine unless the environment variable
    ``DREAM_KERNELS_CPU_ISA`` (``portable``, ``avx2``, ``avx512``,
    ``avx512_bf16``) names others.
    """

    name = "cpu"
    any_value_dim = False

    def why_not(self, problem: Problem) -> str | None:
        if _import_error is not None:
            return f"the native extension is not available ({_import_error})"
        device = problem.query.device
        if device.type != "cpu":
            return f"it needs tensors on the CPU, got {device}"
        if problem.query.dtype not in _DTYPES:
            known = ", ".join(_DTYPES.values())
            return f"it supports {known}, got {problem.query.dtype}"
        if problem.widest_dim > _native.max_head_dim:
            return f"it supports head sizes up to {_native.max_head_dim}, got {problem.widest_dim}"
        return None

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = torch.empty(problem.query.shape, dtype=problem.query.dtype)
        saved = self.empty_saved(problem, needs)
        state, *segment_outputs = saved
        _native.forward(
            _native_problem(problem),
            output=_array(output),
            state=_array(state),
            segment_outputs=_array(*segment_outputs) if segment_outputs else None,
            threads=torch.get_num_threads(),
        )
        return output, saved

    def empty_saved(self, problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
        # Log-sum-exp of each row's logits in every document and, last, outside all of them.
        segments = problem.documents + 1
        state = _row_tensor(problem, segments)
        if needs != _ONLY_SCORES:
            return (state,)
        # The output of each of these segments alone.
        shape = (*problem.query.shape[:3], segments * problem.head_dim)
        if math.prod(shape) * problem.query.element_size() > SEGMENT_OUTPUT_BYTES:
            return (state,)
        return state, torch.empty(shape, dtype=problem.query.dtype, device=state.device)

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        state, *segment_outputs = saved
        if segment_outputs:
            return self._backward_of_scores(problem, state, segment_outputs[0], grad_output)
        gradients = Gradients(
            *(
                torch.empty(tensor.shape, dtype=tensor.dtype)
                if needed and tensor is not None
                else None
                for tensor, needed in zip(problem.tensors, needs)
            )
        )
        _native.backward(
            _native_problem(problem),
            state=_array(state),
            output=_array(output),
            grad_output=_array(grad_output),
            query=_optional(gradients.query),
            key=_optional(gradients.key),
            value=_optional(gradients.value),
            scores=_optional(gradients.scores),
            prefix_key=_optional(gradients.prefix_key),
            prefix_value=_optional(gradients.prefix_value),
            sinks=_optional(gradients.sinks),
            threads=torch.get_num_threads(),
        )
        return gradients

    @staticmethod
    def _backward_of_scores(
        problem: Problem, state: Tensor, segment_outputs: Tensor, grad_output: Tensor
    ) -> Gradients:
        grad_scores = torch.empty(problem.scores.shape, dtype=problem.scores.dtype)
        _native.backward_of_scores(
            _native_problem(problem),
            state=_array(state),
            segment_outputs=_array(segment_outputs),
            grad_output=_array(grad_output),
            scores=_array(grad_scores),
            threads=torch.get_num_threads(),
        )
        return Gradients(None, None, None, grad_scores, None, None, None)

    def mass(self, problem: Problem) -> Tensor:
        mass = _row_tensor(problem, problem.documents)
        _native.document_mass(
            _native_problem(problem), mass=_array(mass), threads=torch.get_num_threads()
        )
        return mass
