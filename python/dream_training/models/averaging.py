"""Averages of the weights before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averaging:
    """Averages a model's weights with those that it has now, before its training.

    A trained model then keeps more of what it knew, and often does better on the new task too
    (Wortsman et al., CVPR 2022).

    Args:
        model: before its training; its parameters that are trained are copied.
        share: of what is learned, 0 .. 1; with 1 nothing is copied or changed.

    Raises:
        ValueError: ``share`` is out of range.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in 0 .. 1, got {share}")
        self.model, self.share = model, share
        self._start = _copies(model) if share < 1 else {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Average the weights inside, and restore the trained ones after."""
        trained = _copies(self.model) if self._start else {}
        self.settle()
        try:
            yield
        finally:
            _interpolate(self.model, trained, 1.0)

    def settle(self) -> None:
        """Set every weight to ``(1 - share) * start + share * weight`` for good."""
        _interpolate(self.model, self._start, 1 - self.share)


def _copies(model: nn.Module) -> dict[str, Tensor]:
    # An adapter adds B A, and B is 0 at first: a share of B alone is that share of the update.
    return {
        name: weight.detach().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad and ".lora_A." not in name
    }


@torch.no_grad()
def _interpolate(model: nn.Module, towards: Mapping[str, Tensor], share: float) -> None:
    weights = dict(model.named_parameters())
    for name, other in towards.items():
        weights[name].lerp_(other, share)
