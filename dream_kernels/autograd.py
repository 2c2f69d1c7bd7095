"""One ``torch.autograd.Function`` over all implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dream_kernels.problem import Gradients, Implementation, Needs, Problem


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor | None) -> Any:
        # The first half are the gradients, the second the tensors that they depend on.
        return tuple(None if t is None else t.view_as(t) for t in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "document_attention has no second derivative: its backward is hand-written and runs "
            "once. For double backward differentiate dream_kernels.reference.attend instead."
        )


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
        problem: Problem,
        implementation: Implementation,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            output, saved = implementation.forward(problem)
        ctx.save_for_backward(
            query, key, value, scores, prefix_key, prefix_value, problem.spans, problem.mask,
            output, *saved,
        )  # fmt: skip
        # The problem itself is not kept: its tensors must go through the saved list, which frees
        # them after the backward and notices in-place changes.
        ctx.options = {
            "heads": problem.heads,
            "mode": problem.mode,
            "document_mass": problem.document_mass,
            "scale": problem.scale,
            "causal": problem.causal,
        }
        ctx.implementation = implementation
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,) = grad_outputs
        query, key, value, scores, prefix_key, prefix_value, spans, mask, output, *saved = (
            ctx.saved_tensors
        )
        problem = Problem(
            query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value,
            scores=scores, spans=spans, mask=mask, **ctx.options,
        )  # fmt: skip
        needs = Needs(*ctx.needs_input_grad[:6])
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            gradients: Gradients = ctx.implementation.backward(
                problem, output, tuple(saved), grad_output, needs
            )
        if torch.is_grad_enabled():
            inputs = (query, key, value, scores, prefix_key, prefix_value)
            # grad_output stands in for a query that is frozen: the gradients depend on both.
            sources = (grad_output if not query.requires_grad else query, *inputs[1:])
            gradients = Gradients(*_FirstDerivativeOnly.apply(*gradients, *sources))
        return (*gradients, None, None)


def run(problem: Problem, implementation: Implementation) -> Tensor:
    """Apply the operator to a validated problem, recording it for autograd where needed."""
    return DocumentAttention.apply(
        problem.query, problem.key, problem.value, problem.scores,
        problem.prefix_key, problem.prefix_value, problem, implementation,
    )  # fmt: skip
