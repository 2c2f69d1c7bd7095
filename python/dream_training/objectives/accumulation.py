"""Batches whose gradients make one step: each counts by what it predicts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dream_training.distributed.sharding import is_sharded


class Accumulation:
    r"""Makes the gradient that a trainer accumulates over batches that of one batch of their pools.

    A trainer divides the mean loss :math:`L_i` of each of :math:`K` batches by :math:`K`, as if all
    had the same number :math:`T_i` of terms. With :math:`S_i = \sum_{j \le i} T_j`, the backward of
    batch :math:`i` multiplies

    .. math:: \text{the gradients that are there by } \frac{i}{i - 1} \frac{S_{i-1}}{S_i},
              \qquad \text{its own by } i\, \frac{T_i}{S_i},

    which leaves :math:`\frac{i}{K} \nabla \sum_{j \le i} T_j L_j / S_i`, exact after the last
    batch. So neither :math:`K` nor the batches to come need to be known, and any trainer will do
    that tells accelerate when a step ends, as that of transformers does. Elsewhere every batch is a
    step of its own and keeps its gradient. No other loss may train the same parameters in the step.

    Args:
        objective: the loss; its trained parameters hold the gradients, its ``model`` is trained.

    Attributes:
        ended: whether the next batch is the first of a step.
    """

    def __init__(self, objective: nn.Module) -> None:
        self._objective: Any = objective
        self.ended = True
        self._batches, self._terms, self._pass, self._factor = 0, 0, -1, 1.0

    def weighted(self, loss: Tensor, terms: int) -> Tensor:
        """Return ``loss`` with the gradient that its batch is due.

        Args:
            loss: scalar, the mean over the terms of a batch.
            terms: of the batch, in all processes.

        Raises:
            ValueError: FSDP or DeepSpeed hold the gradients of batches with unequal terms.
        """
        if not loss.requires_grad:
            return loss
        engine = engine_of(self._objective.model)
        if engine and not self.ended and terms * self._batches != self._terms:
            raise ValueError(
                f"gradient_accumulation_steps must be 1 with {engine}, which holds the gradients: "
                f"a step's batches must count by what they predict, and this one has {terms} "
                f"terms, those before it {self._terms} in {self._batches}. mini_batch_size makes "
                "room for a larger batch"
            )
        return _Weighted.apply(loss, self, terms)

    def count(self, terms: int) -> float:
        """Count a batch as its backward begins, scale what is there, and return its factor."""
        # Losses that share a backward, such as those of several embedding sizes, are one batch.
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass, self._factor = current, self._add(terms)
        self.ended = _is_last()
        return self._factor

    def _add(self, terms: int) -> float:
        engine = engine_of(self._objective.model)
        if not engine and all(p.grad is None for p in self._objective.model.parameters()):
            # Older trainers clear the gradients of the model alone.
            self._objective.zero_grad(set_to_none=True)
        gradients = [p.grad for p in self._objective.parameters() if p.grad is not None]
        if self.ended or not (gradients or engine):
            self._batches, self._terms = 1, terms
            return 1.0
        before, self._batches = self._batches, self._batches + 1
        share, self._terms = self._terms, self._terms + terms
        for gradient in gradients:
            gradient.mul_(self._batches / before * share / max(self._terms, 1))
        return self._batches * terms / max(self._terms, 1)


class StepMetrics:
    """Metrics of the batches of a step as those of one batch."""

    def __init__(self) -> None:
        self._ended = True
        self._parts: list[tuple[dict[str, float], dict[str, float]]] = []

    def add(
        self, metrics: Mapping[str, float], weights: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add those of a batch.

        Args:
            metrics: of the batch.
            weights: for means, of how many things; a metric without a weight is summed.

        Returns:
            The metrics of the step so far, and their weights.
        """
        if self._ended:
            self._parts.clear()
        self._ended = _is_last()
        self._parts.append((dict(metrics), dict(weights)))
        names = dict.fromkeys(name for own, _ in self._parts for name in own)
        totals = {
            name: sum(own[name] for metrics, own in self._parts if name in metrics)
            for name in weights
        }
        values = {
            name: sum(
                own[name] * weight.get(name, 1.0) for own, weight in self._parts if name in own
            )
            for name in names
        }
        means = {
            name: value / totals[name] if totals.get(name) else value
            for name, value in values.items()
        }
        return means, totals


def _is_last() -> bool:
    """Whether the batch of now is the last of its step, as the trainer has told accelerate."""
    from accelerate.state import GradientState

    return bool(GradientState().sync_gradients)


class _Weighted(torch.autograd.Function):
    """Changes no value; its backward is the first node of a batch's backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, accumulation: Accumulation, terms: int) -> Tensor:
        ctx.accumulation, ctx.terms = accumulation, terms
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return grad_outputs[0] * ctx.accumulation.count(ctx.terms), None, None


def engine_of(model: nn.Module) -> str | None:
    """The engine that keeps gradients, and perhaps weights, away from the parameters, if any."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        return "DeepSpeed"
    return "FSDP" if is_sharded(model) else None
