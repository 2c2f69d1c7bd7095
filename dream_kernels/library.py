"""The operator in ``torch.library``, for ``torch.compile`` and ``torch.export``.

A traced graph holds the operator as one opaque node, ``torch.ops.dream_kernels.attend``. Its fake
implementation returns the shapes of the outputs; the real one is the code that runs eagerly, after
the checks of values that could not run while the graph was traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dream_kernels.problem import Gradients, Needs, Problem
from dream_kernels.value_checks import check_problem_values

SECOND_DERIVATIVE = (
    "document_attention has no second derivative: its backward is hand-written and runs once. "
    "For double backward differentiate dream_kernels.reference.attend instead."
)

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor scores, Tensor? prefix_key, "
    "Tensor? prefix_value, Tensor? sinks, Tensor spans, Tensor? mask, Tensor? positions, "
    "bool[] heads, str mode, float? document_mass, float scale, bool causal, int? window, "
    "float? softcap, str impl"
)
_PROBLEM_ARGUMENTS = 18
_DIFFERENTIABLE = len(Needs._fields)
_TENSORS = _DIFFERENTIABLE + 3  # spans, mask and positions follow

_library = torch.library.Library("dream_kernels", "DEF")
_library.define(f"attend({_PROBLEM}, bool[] needs) -> (Tensor output, Tensor[] saved)")
_library.define(
    f"attend_backward({_PROBLEM}, bool[] needs, Tensor output, Tensor[] saved, Tensor grad_output) "
    "-> Tensor[]"
)
_library.define(f"document_mass({_PROBLEM}) -> Tensor")


def attend(problem: Problem, impl: str, needs: Needs) -> Tensor:
    """Apply the operator as a node of a graph that is being traced."""
    return torch.ops.dream_kernels.attend(*_flatten(problem, impl), list(needs))[0]


def document_mass(problem: Problem, impl: str) -> Tensor:
    """Compute the masses as a node of a graph that is being traced."""
    return torch.ops.dream_kernels.document_mass(*_flatten(problem, impl))


def _flatten(problem: Problem, impl: str) -> tuple[Any, ...]:
    options = problem.options
    options["heads"] = list(options["heads"])
    return (*problem.tensors, *problem.geometry, *options.values(), impl)


def _unflatten(arguments: tuple[Any, ...]) -> tuple[Problem, Any]:
    from dream_kernels.dispatch import IMPLEMENTATIONS

    *fields, impl = arguments
    fields[_TENSORS] = tuple(fields[_TENSORS])  # heads, which are a list in the schema
    return Problem(*fields), IMPLEMENTATIONS[impl]


def _attend(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    problem, implementation = _unflatten(arguments[:_PROBLEM_ARGUMENTS])
    check_problem_values(problem)
    with torch.autocast(problem.query.device.type, enabled=False):
        output, saved = implementation.forward(problem, Needs(*arguments[-1]))
    return output, list(saved)


def _attend_fake(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    problem, implementation = _unflatten(arguments[:_PROBLEM_ARGUMENTS])
    saved = implementation.empty_saved(problem, Needs(*arguments[-1]))
    return problem.query.new_empty(problem.output_shape), list(saved)


def _setup_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], output[0], *output[1])
    ctx.options = inputs[_TENSORS:_PROBLEM_ARGUMENTS]


def _differentiate_attend(ctx: Any, grad_output: Tensor, grad_saved: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # read once, for the sake of gradient checkpointing
    output, *saved = tensors[_TENSORS:]
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    computed = iter(
        torch.ops.dream_kernels.attend_backward(
            *tensors[:_TENSORS], *ctx.options, needs, output, saved, grad_output
        )
    )
    gradients = [next(computed) if needed else None for needed in needs]
    return (*gradients, *[None] * (_PROBLEM_ARGUMENTS + 1 - _DIFFERENTIABLE))


def _attend_backward(*arguments: Any) -> list[Tensor]:
    problem, implementation = _unflatten(arguments[:_PROBLEM_ARGUMENTS])
    needs, output, saved, grad_output = arguments[_PROBLEM_ARGUMENTS:]
    with torch.autocast(problem.query.device.type, enabled=False):
        gradients: Gradients = implementation.backward(
            problem, output, tuple(saved), grad_output, Needs(*needs)
        )
    return [gradient for gradient in gradients if gradient is not None]


def _attend_backward_fake(*arguments: Any) -> list[Tensor]:
    problem, _ = _unflatten(arguments[:_PROBLEM_ARGUMENTS])
    needs = arguments[_PROBLEM_ARGUMENTS]
    return [
        t.new_empty(t.shape)
        for t, needed in zip(problem.tensors, needs)
        if needed and t is not None
    ]


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """A refusal needs nothing."""


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(SECOND_DERIVATIVE)


def _document_mass(*arguments: Any) -> Tensor:
    problem, implementation = _unflatten(arguments)
    check_problem_values(problem)
    with torch.autocast(problem.query.device.type, enabled=False):
        return implementation.mass(problem)


def _document_mass_fake(*arguments: Any) -> Tensor:
    problem, _ = _unflatten(arguments)
    shape = (*problem.query.shape[:3], problem.documents)
    return problem.query.new_empty(shape, dtype=problem.accumulate_dtype)


def _setup_document_mass(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _differentiate_document_mass(ctx: Any, grad_mass: Tensor) -> tuple[None, ...]:
    return (None,) * _PROBLEM_ARGUMENTS


for _name, _real, _fake in (
    ("attend", _attend, _attend_fake),
    ("attend_backward", _attend_backward, _attend_backward_fake),
    ("document_mass", _document_mass, _document_mass_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dream_kernels::{_name}", _fake, lib=_library)
for _name, _backward, _setup in (
    ("attend", _differentiate_attend, _setup_attend),
    ("attend_backward", _refuse_second_derivative, _setup_nothing),
    ("document_mass", _differentiate_document_mass, _setup_document_mass),
):
    torch.library.register_autograd(
        f"dream_kernels::{_name}", _backward, setup_context=_setup, lib=_library
    )
