"""The Triton implementation's door: what it can run, and the calls behind which triton is used."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem

OLDEST = (3, 2)
MAX_HEAD_DIM = 256
# AMD's architectures that every kernel is compiled for; see README.md.
AMD = ("gfx942",)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _triton_missing() -> str | None:
    """Return why triton cannot be used, or None when it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"it needs triton {oldest} or newer, got {triton.__version__}"
    return None


def interpreted() -> bool:
    """Return whether triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def _device_refusal(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a CUDA or HIP device, or None when they can."""
    if torch.version.hip is not None:
        # "gfx942:sramecc+:xnack-"
        architecture = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if architecture in AMD:
            return None
        known = ", ".join(AMD)
        return f"its kernels are compiled for AMD GPUs of {known} only, got {architecture}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, got {major}.{minor}"
    return None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one: triton launches on that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TritonImplementation:
    """Triton kernels for float16, bfloat16 and float32 on NVIDIA and AMD GPUs, sums in float32.

    float32 products are exact unless PyTorch's own switch, ``torch.set_float32_matmul_precision``,
    allows TF32, which only NVIDIA GPUs take here. With ``TRITON_INTERPRET=1`` in the environment
    before triton is imported, the kernels run in triton's interpreter on the CPU: for tests.
    """

    name = "triton"

    def why_not(self, problem: Problem) -> str | None:
        device = problem.query.device
        missing = _triton_missing()
        if missing is not None:
            return missing
        if device.type == "cpu" and not interpreted():
            return f"it needs tensors on a CUDA or HIP device, got {device}"
        if device.type not in ("cpu", "cuda"):
            return f"it needs tensors on a CUDA or HIP device, got {device}"
        if problem.query.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            return f"it supports {known}, got {problem.query.dtype}"
        if problem.head_dim > MAX_HEAD_DIM:
            return f"it supports head sizes up to {MAX_HEAD_DIM}, got {problem.head_dim}"
        if device.type == "cpu" and problem.query.dtype == torch.bfloat16:
            return "triton's interpreter computes wrong bfloat16 products"
        return _device_refusal(device) if device.type == "cuda" else None

    def empty_saved(self, problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
        """Return uninitialised tensors in the form of what :meth:`forward` saves."""
        slots = 1 if problem.mode == "bias" else problem.documents + 1
        shape = (problem.batch, problem.query_heads, slots, problem.rows)
        return (torch.empty(shape, dtype=torch.float32, device=problem.query.device),)

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        from dream_kernels.triton import launch

        with _on(problem.query.device):
            (state,) = saved = self.empty_saved(problem, needs)
            return launch.forward(problem, state), saved

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        from dream_kernels.triton import launch

        (state,) = saved
        with _on(problem.query.device):
            return launch.backward(problem, output, state, grad_output, needs)

    def mass(self, problem: Problem) -> Tensor:
        from dream_kernels.triton import launch

        with _on(problem.query.device):
            return launch.mass(problem)
