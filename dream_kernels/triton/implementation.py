"""The Triton implementation: what it can run. Triton is imported by the first call."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.triton.device import current, device_refusal, interpreted, triton_missing

MAX_HEAD_DIM = 256
# Of the second and third axis of a launch on NVIDIA GPUs.
MAX_GRID = 65_535
_BY_ELEMENT = (
    "query", "key", "value", "scores", "prefix_key", "prefix_value", "spans", "mask", "positions",
)  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonImplementation:
    """Triton kernels for float16, bfloat16 and float32 on NVIDIA and AMD GPUs, sums in float32.

    float32 products are exact unless PyTorch's own switch, ``torch.set_float32_matmul_precision``,
    allows TF32, which only NVIDIA GPUs take here. With ``TRITON_INTERPRET=1`` in the environment
    before triton is imported, the kernels run in triton's interpreter on the CPU: for tests.
    """

    name = "triton"
    any_value_dim = False

    def why_not(self, problem: Problem) -> str | None:
        device = problem.query.device
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"it needs tensors on a CUDA or HIP device, got {device}"
        missing = triton_missing()
        if missing is not None:
            return missing
        if problem.query.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            return f"it supports {known}, got {problem.query.dtype}"
        if problem.widest_dim > MAX_HEAD_DIM:
            return f"it supports head sizes up to {MAX_HEAD_DIM}, got {problem.widest_dim}"
        if problem.query_heads > MAX_GRID:
            return f"it supports up to {MAX_GRID} heads, got {problem.query_heads}"
        if device.type == "cpu" and problem.query.dtype == torch.bfloat16:
            return "triton's interpreter computes wrong bfloat16 products"
        return device_refusal(device) if device.type == "cuda" else None

    def empty_saved(self, problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
        """Return uninitialised tensors in the form of what :meth:`forward` saves."""
        slots = 1 if problem.mode == "bias" else problem.documents + 1
        shape = (problem.batch, problem.query_heads, slots, problem.rows)
        state = torch.empty(shape, dtype=torch.float32, device=problem.query.device)
        if not _keeps_part(problem, needs):
            return (state,)
        return state, problem.query.new_empty(problem.query.shape)

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        from dream_kernels.triton import launch

        if problem.batch > MAX_GRID:
            outputs, saved = zip(*[self.forward(part, needs) for part, _ in _parts(problem)])
            return torch.cat(outputs), tuple(map(torch.cat, zip(*saved)))
        with current(problem.query.device):
            saved = self.empty_saved(problem, needs)
            return launch.forward(problem, *saved), saved

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        from dream_kernels.triton import launch

        if problem.batch > MAX_GRID:
            found = [
                self.backward(
                    part, output[own], tuple(t[own] for t in saved), grad_output[own], needs
                )
                for part, own in _parts(problem)
            ]
            joined = map(_join, zip(*found), problem.tensors, repeat(problem.batch))
            return Gradients(*joined)
        with current(problem.query.device):
            return launch.backward(problem, output, saved, grad_output, needs)

    def mass(self, problem: Problem) -> Tensor:
        from dream_kernels.triton import launch

        if problem.batch > MAX_GRID:
            return torch.cat([self.mass(part) for part, _ in _parts(problem)])
        with current(problem.query.device):
            return launch.mass(problem)


def _join(gradients: tuple[Tensor | None, ...], whole: Tensor | None, batch: int) -> Tensor | None:
    """The gradient of a tensor from those of the parts, all of which share what has no batch."""
    found = [gradient for gradient in gradients if gradient is not None]
    if whole is None or not found:
        return None
    return torch.cat(found) if len(whole) == batch else torch.stack(found).sum(0)


def _parts(problem: Problem) -> list[tuple[Problem, slice]]:
    """Problems of no more batch elements than a grid has places for, and which elements."""
    found = []
    for begin in range(0, problem.batch, MAX_GRID):
        own = slice(begin, begin + MAX_GRID)
        named = {name: getattr(problem, name) for name in _BY_ELEMENT}
        named = {n: t if t is None or len(t) == 1 else t[own] for n, t in named.items()}
        found.append((replace(problem, **named), own))
    return found


def _keeps_part(problem: Problem, needs: Needs) -> bool:
    """Whether the backward reads the output of the documents alone, or of the rest; see README."""
    logits = needs.query or needs.key or needs.prefix_key or needs.sinks
    return logits and problem.mode == "reweight" and any(problem.heads)
