"""The native CPU implementation: hands pointers and strides to ``dream_kernels._native``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dream_kernels.native import DTYPES, array, native_import_error, native_problem, optional
from dream_kernels.problem import Gradients, Needs, Problem

if native_import_error() is None:
    import dream_kernels._native as _native

# If only the scores need a gradient, as in the first injected layer of a frozen reader, forward
# keeps the output of every document, up to this size: the backward then reads no key. Sums are
# rounded in other places, so the output differs in its last bits.
SEGMENT_OUTPUT_BYTES = 32 << 20

_ONLY_SCORES = Needs(False, False, False, True, False, False, False)


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
        missing = native_import_error()
        if missing is not None:
            return f"the native extension is not available ({missing})"
        device = problem.query.device
        if device.type != "cpu":
            return f"it needs tensors on the CPU, got {device}"
        if problem.query.dtype not in DTYPES:
            known = ", ".join(DTYPES.values())
            return f"it supports {known}, got {problem.query.dtype}"
        if problem.widest_dim > _native.max_head_dim:
            return f"it supports head sizes up to {_native.max_head_dim}, got {problem.widest_dim}"
        return None

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = torch.empty(problem.query.shape, dtype=problem.query.dtype)
        saved = self.empty_saved(problem, needs)
        state, *segment_outputs = saved
        _native.forward(
            native_problem(problem),
            output=array(output),
            state=array(state),
            segment_outputs=array(*segment_outputs) if segment_outputs else None,
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
            native_problem(problem),
            state=array(state),
            output=array(output),
            grad_output=array(grad_output),
            query=optional(gradients.query),
            key=optional(gradients.key),
            value=optional(gradients.value),
            scores=optional(gradients.scores),
            prefix_key=optional(gradients.prefix_key),
            prefix_value=optional(gradients.prefix_value),
            sinks=optional(gradients.sinks),
            threads=torch.get_num_threads(),
        )
        return gradients

    @staticmethod
    def _backward_of_scores(
        problem: Problem, state: Tensor, segment_outputs: Tensor, grad_output: Tensor
    ) -> Gradients:
        grad_scores = torch.empty(problem.scores.shape, dtype=problem.scores.dtype)
        _native.backward_of_scores(
            native_problem(problem),
            state=array(state),
            segment_outputs=array(segment_outputs),
            grad_output=array(grad_output),
            scores=array(grad_scores),
            threads=torch.get_num_threads(),
        )
        return Gradients(None, None, None, grad_scores, None, None, None)

    def mass(self, problem: Problem) -> Tensor:
        mass = _row_tensor(problem, problem.documents)
        _native.document_mass(
            native_problem(problem), mass=array(mass), threads=torch.get_num_threads()
        )
        return mass
