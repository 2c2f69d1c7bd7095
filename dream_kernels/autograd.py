"""One ``torch.autograd.Function`` over all implementations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from dream_kernels import library
from dream_kernels.argument_checks import is_traced
from dream_kernels.problem import Gradients, Implementation, Needs, Problem, Reading, readable

# Saved before what the implementation saves: the tensors with gradients, spans, mask, positions
# and the output.
_INPUTS = len(Needs._fields) + 4
_NOTHING = Needs(*[False] * len(Needs._fields))


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor | None) -> Any:
        # The first half are the gradients, the second the tensors that they depend on.
        return tuple(None if t is None else t.view_as(t) for t in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(library.SECOND_DERIVATIVE)


class DocumentAttention(torch.autograd.Function):
    """Forward and hand-written backward of the operator, whatever implementation runs it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        sinks: Tensor | None,
        problem: Problem,
        implementation: Implementation,
        needs: Needs,
    ) -> Tensor:
        output, saved = _forward(problem, implementation, needs)
        # The problem itself is not kept: its tensors must go through the saved list, which frees
        # them after the backward and detects in-place changes.
        ctx.save_for_backward(*problem.tensors, *problem.geometry, output, *saved)
        ctx.options = problem.options
        ctx.reading = problem.reading
        ctx.implementation = implementation
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,) = grad_outputs
        # Read once: under gradient checkpointing a second read would recompute everything.
        tensors = ctx.saved_tensors
        (*inputs, output), saved = tensors[:_INPUTS], tensors[_INPUTS:]
        problem = Problem(*inputs, **{**ctx.options, "reading": ctx.reading})
        # It is dropped as the saved tensors are. Where the graph is retained, the next backward
        # makes its own.
        ctx.reading = Reading()
        needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
        recorded = torch.is_grad_enabled()  # for a second derivative
        with _plainly(grad_output.device.type, recorded):
            gradients: Gradients = ctx.implementation.backward(
                problem, output, saved, readable(grad_output), needs
            )
        if recorded:
            # grad_output replaces a frozen query: the gradients depend on both.
            query = problem.query if problem.query.requires_grad else grad_output
            gradients = Gradients(
                *_FirstDerivativeOnly.apply(*gradients, query, *problem.tensors[1:])
            )
        return (*gradients, None, None, None)


def run(problem: Problem, implementation: Implementation) -> Tensor:
    """Apply the operator to a validated problem, recording it for autograd where needed."""
    if problem.empty:
        return _of_no_rows(problem)
    if problem.value_dim != problem.head_dim and not implementation.any_value_dim:
        return run(problem.with_equal_dims(), implementation)[..., : problem.value_dim]
    needs = _NOTHING
    if torch.is_grad_enabled():
        needs = Needs(*[t is not None and t.requires_grad for t in problem.tensors])
    if is_traced(problem.query):
        return library.attend(problem, implementation.name, needs)
    if not any(needs) and forward_ad._current_level < 0:
        # Nothing is recorded, and torch.autograd.Function takes longer than a short call.
        return _forward(problem, implementation, needs)[0]
    return DocumentAttention.apply(*problem.tensors, problem, implementation, needs)


def _of_no_rows(problem: Problem) -> Tensor:
    """An empty output, on which all tensors have gradients of 0."""
    output = problem.query.new_zeros(problem.output_shape)
    for tensor in problem.tensors:
        if tensor is not None and tensor.requires_grad:
            output = output + 0.0 * tensor.sum().to(output.dtype)
    return output


def _forward(
    problem: Problem, implementation: Implementation, needs: Needs
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the forward, without autocast."""
    with _plainly(problem.query.device.type, recorded=False):
        return implementation.forward(problem, needs)


def _plainly(device: str, recorded: bool) -> AbstractContextManager[None]:
    """Without autocast and gradients; what would change nothing takes as long as a launch."""
    usual = not (recorded or torch.is_autocast_enabled(device))
    return nullcontext() if usual else _without_autocast_and_gradients(device)


@contextmanager
def _without_autocast_and_gradients(device: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield
