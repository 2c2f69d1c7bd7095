"""What depends on the machine: which triton there is, properties of the device, measured times."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, wraps
from itertools import pairwise
from typing import Any, TypeVar

import torch

OLDEST_TRITON = (3, 2)
# The AMD architectures that every kernel is compiled for; see README.md.
AMD = ("gfx942",)


Answer = TypeVar("Answer")


def asked_once(question: Callable[..., Answer]) -> Callable[..., Answer]:
    """Keep the answers of a function that every call asks, outside of graphs that are recorded.

    torch.compile would ignore a cache there, and warn of it.
    """
    kept = cache(question)

    @wraps(question)
    def answer(*arguments: Any) -> Answer:
        return question(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return answer


@asked_once
def triton_missing() -> str | None:
    """Return why triton cannot be used, or None when it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if triton_version() < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"it needs triton {oldest} or newer, got {triton.__version__}"
    return None


def triton_version() -> tuple[int, ...]:
    """Major and minor version of triton."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def switched_on(variable: str) -> bool:
    """Whether a variable of the environment is set to a yes, as triton reads its own."""
    return os.environ.get(variable, "0").lower() in ("1", "true", "on", "yes")


def interpreted() -> bool:
    """Return whether triton's kernels run in its interpreter, on the CPU."""
    return switched_on("TRITON_INTERPRET")


@asked_once
def device_refusal(device: torch.device) -> str | None:
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


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one, on which triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device, 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def capability(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU, 0 for an AMD one and the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 is multiplied: exactly, unless PyTorch's own switch allows TF32."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Where the newer switch exists, reading the old one fails once the newer one was set.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def name(device: torch.device) -> str:
    """The model of a CUDA or HIP device."""
    return torch.cuda.get_device_name(device)


def capturing() -> bool:
    """Whether the current stream is capturing a CUDA graph, so that launches do not run."""
    return torch.cuda.is_current_stream_capturing()


def captures(device: torch.device) -> bool:
    """Whether launches on a device become part of a CUDA graph now."""
    return device.type == "cuda" and capturing()


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of five runs, after one that compiles and one that warms up."""
    run()
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for mark in marks:
        mark.record()
        run()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return sorted(times)[len(times) // 2]
