"""The CUDA C++ implementation, ``csrc/cuda``: memory, and calls of the native extension."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from dream_kernels.native import Array, array, native_import_error, native_problem, optional
from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.reference import safe_exp
from dream_kernels.triton import device as gpus

if native_import_error() is None:
    import dream_kernels._native as _native

HEAD_DIMS = (64, 128)
MAX_HEADS = 256
_DTYPES = (torch.float16, torch.bfloat16)
# Of the third axis of a launch.
_MAX_BATCH = 65_535
# Slots of reweight's state that are no documents: the rest, all documents, all keys.
_OTHER_SLOTS = 3
# Arrays in a workspace begin at multiples of this.
_ALIGNMENT = 256
# Rows of a block of the forward, and the fewest keys that are worth a split: a split writes partial
# results, which are read again.
_BLOCK_ROWS = 64
MIN_SPLIT_KEYS = 256


def emulated() -> bool:
    """Whether CPU tensors run the kernels' build for the host: for tests, and to compare."""
    return gpus.switched_on("DREAM_KERNELS_CUDA_EMULATE")


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, 0 in the emulator, which gains nothing from splits."""
    return gpus.processors(device) if device.type == "cuda" else 0


def _device_refusal(device: torch.device) -> str | None:
    if device.type == "cpu":
        if emulated():
            return None
        return (
            "it needs tensors on a CUDA device, got cpu "
            "(DREAM_KERNELS_CUDA_EMULATE=1 runs its kernels on the CPU, slowly)"
        )
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs tensors on an NVIDIA GPU, got {device}"
    if not _native.cuda_architectures:
        return (
            "its kernels were left out when the package was built without nvcc; "
            "build it again with DREAM_KERNELS_CUDA=1"
        )
    return gpus.device_refusal(device)


def _option_refusal(problem: Problem) -> str | None:
    for name in ("window", "softcap", "sinks"):
        if getattr(problem, name) is not None:
            return f"it does not support {name}"
    if problem.query.dtype not in _DTYPES:
        return f"it supports float16 and bfloat16, got {problem.query.dtype}"
    if problem.widest_dim not in HEAD_DIMS:
        return f"it supports head sizes 64 and 128, got {problem.widest_dim}"
    if problem.query_heads > MAX_HEADS:
        return f"it supports up to {MAX_HEADS} heads, got {problem.query_heads}"
    if problem.batch > _MAX_BATCH:
        return f"it supports up to {_MAX_BATCH} batch elements, got {problem.batch}"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, in rows that are copied 16 bytes at a time."""
    *outer, last = tensor.stride()
    sizes = tensor.shape
    aligned = last == 1 and tensor.data_ptr() % 16 == 0
    if aligned and all(s % 8 == 0 or n == 1 for s, n in zip(outer, sizes)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _plan_bytes(problem: Problem) -> int:
    length, documents = problem.total_length, problem.documents
    tiles = length // (64 if problem.head_dim == 64 else 32) + documents
    score_heads = problem.scores.shape[1]
    sizes = (length + 1) * 4, 3 * length * 4, tiles * 16, 16, score_heads * documents * 4
    return sum((problem.batch * size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT for size in sizes)


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


class _Call:
    """One problem in the extension's terms; it keeps alive what was copied for it."""

    def __init__(self, problem: Problem) -> None:
        native = native_problem(problem)
        if not _native.cuda_readable(native):
            problem = _with_rows(problem)
            native = native_problem(problem)
        self.problem, self.native = problem, native

    def splits(self, block_rows: int = _BLOCK_ROWS) -> int:
        """How many parts the keys of so many rows are cut into, to fill the GPU."""
        p = self.problem
        heads, batch, length = p.key_heads, p.batch, p.total_length
        blocks = -(-p.query_heads // heads * p.rows // block_rows) * heads * batch
        wanted = 2 * processors(p.query.device) // blocks
        return max(1, min(wanted, length // MIN_SPLIT_KEYS))


def _with_rows(problem: Problem) -> Problem:
    """The same problem, with copies of what the kernels cannot read."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _rows(tensor)

    return replace(
        problem,
        query=_rows(problem.query),
        key=_rows(problem.key),
        value=_rows(problem.value),
        prefix_key=rows(problem.prefix_key),
        prefix_value=rows(problem.prefix_value),
        spans=problem.spans.contiguous(),
        mask=None if problem.mask is None else problem.mask.contiguous(),
    )


def _on(device: torch.device) -> tuple[AbstractContextManager[object], int | None]:
    """What makes a GPU the current one, and its current stream; None in the emulator."""
    if device.type != "cuda":
        return nullcontext(), None
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        return nullcontext(), stream
    return torch.cuda.device(device), stream


class CudaImplementation:
    """CUDA C++ for float16 and bfloat16 with head sizes 64 and 128 on NVIDIA GPUs, sums in float32.

    With ``DREAM_KERNELS_CUDA_EMULATE=1`` in the environment the same kernels, compiled for the
    host, take CPU tensors: for tests, and to compare results without a GPU.
    """

    name = "cuda"
    any_value_dim = False

    def why_not(self, problem: Problem) -> str | None:
        missing = native_import_error()
        if missing is not None:
            return f"the native extension is not available ({missing})"
        return _device_refusal(problem.query.device) or _option_refusal(problem)

    def empty_saved(self, problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
        """Log-sum-exps ``[B, Hq, slots, M]`` of every row, and the plan."""
        device = problem.query.device
        slots = 1 if problem.mode == "bias" else problem.documents + _OTHER_SLOTS
        shape = (problem.batch, problem.query_heads, slots, problem.rows)
        state = torch.empty(shape, dtype=torch.float32, device=device)
        return state, _bytes(_plan_bytes(problem), device)

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = torch.empty(
            problem.output_shape, dtype=problem.query.dtype, device=problem.query.device
        )
        state, plan = saved = self.empty_saved(problem, needs)
        call = _Call(problem)
        splits, partial = call.splits(), None
        if splits > 1:
            partial = _bytes(_native.cuda_sizes(call.native, splits)[1], output.device)
        device, stream = _on(output.device)
        with device:
            _native.cuda_forward(
                call.native,
                output=array(output),
                state=array(state),
                plan=array(plan),
                partial=optional(partial),
                splits=splits,
                stream=stream,
            )
        return output, saved

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        state, plan = saved
        call = _Call(problem)
        splits = call.splits(_BLOCK_ROWS if problem.head_dim == 64 else _BLOCK_ROWS // 2)
        memory = _bytes(_native.cuda_sizes(call.native, splits)[2], output.device)
        gradients = _empty_gradients(problem, needs)
        grad_output = _rows(grad_output)
        device, stream = _on(output.device)
        with device:
            _native.cuda_backward(
                call.native,
                state=array(state),
                plan=array(plan),
                memory=array(memory),
                output=array(_rows(output)),
                grad_output=array(grad_output),
                splits=splits,
                stream=stream,
                **_arrays(gradients),
            )
        if gradients.prefix_key is None and gradients.prefix_value is None:
            return gradients
        return Gradients(
            *(
                None if gradient is None or tensor is None else gradient.to(tensor.dtype)
                for gradient, tensor in zip(gradients, problem.tensors)
            )
        )

    def mass(self, problem: Problem) -> Tensor:
        shape = (
            problem.batch, problem.query_heads, problem.documents + _OTHER_SLOTS, problem.rows,
        )  # fmt: skip
        # Nobody writes the slot of an absent document.
        state = torch.full(shape, -torch.inf, dtype=torch.float32, device=problem.query.device)
        plan = _bytes(_plan_bytes(problem), problem.query.device)
        call = _Call(problem)
        device, stream = _on(problem.query.device)
        with device:
            _native.cuda_masses(call.native, state=array(state), plan=array(plan), stream=stream)
        # Of base 2.
        logs = state.transpose(2, 3) * torch.log(torch.tensor(2.0)).item()
        return safe_exp(logs[..., : problem.documents], logs[..., -1:]).contiguous()


def _empty_gradients(problem: Problem, needs: Needs) -> Gradients:
    """Tensors for the gradients; where several rows add to a shared prefix, in float32.

    Those of keys begin as zeros: the kernel does not visit padding.
    """
    shared = problem.prefix_key is not None and problem.prefix_key.shape[0] == 1

    def empty(name: str, tensor: Tensor | None, needed: bool) -> Tensor | None:
        if not needed or tensor is None:
            return None
        dtype = torch.float32 if shared and name.startswith("prefix") else tensor.dtype
        make = torch.empty if name in ("query", "scores") else torch.zeros
        return make(tensor.shape, dtype=dtype, device=tensor.device)

    return Gradients(*map(empty, Needs._fields, problem.tensors, needs))


def _arrays(gradients: Gradients) -> dict[str, Array | None]:
    arrays = {name: optional(gradient) for name, gradient in gradients._asdict().items()}
    del arrays["sinks"]
    return arrays
