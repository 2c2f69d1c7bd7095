"""Averages of the weights before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def average_weights(model: nn.Module, start: Mapping[str, Tensor], share: float) -> None:
    """Set every weight to ``(1 - share) * start + share * weight``.

    So a trained model keeps more of what it knew, and often does better on the new task too
    (Wortsman et al., CVPR 2022).

    Args:
        model: after its training.
        start: from :func:`copy_weights`, before it.
        share: of what was learned, 0 .. 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0 .. 1, got {share}")
    weights = dict(model.named_parameters())
    for name, begin in start.items():
        weights[name].lerp_(begin, 1 - share)


@contextmanager
def averaged(model: nn.Module, start: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Average the weights inside, as :func:`average_weights` does, and restore them after."""
    trained = copy_weights(model)
    average_weights(model, start, share)
    try:
        yield
    finally:
        average_weights(model, trained, 0.0)
