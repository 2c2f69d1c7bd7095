"""Trained weights are float32: an update is smaller than 16 bits can represent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_NARROW = (torch.bfloat16, torch.float16)


def narrow_weights(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that are trained in 16 bits."""
    return [p for p in parameters if p.requires_grad and p.dtype in _NARROW]


def train_in_float32(model: SentenceTransformer) -> None:
    """Convert the weights of a retriever that are trained in 16 bits to float32, in place.

    An optimiser's update of 1e-5 vanishes in a bfloat16 weight of 0.02, which changes in steps of
    1e-4. Adapters alone become float32; if other weights are trained, the whole model does, and its
    passes in training compute in bfloat16 (float16 would need its gradients scaled). Otherwise
    it computes in float32, as it is saved.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    narrow = narrow_weights(model.parameters())
    adapters = {
        id(p)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for p in narrow_weights(module.parameters())
    }
    if all(id(p) in adapters for p in narrow):
        for parameter in narrow:
            parameter.data = parameter.data.float()
        return
    model.float()
    passes = _InBfloat16()
    model.register_forward_pre_hook(passes.begin)
    model.register_forward_hook(passes.end, always_call=True)


class _InBfloat16:
    """Autocast around the passes of a module in training mode."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def begin(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            device = next(module.parameters()).device
            self._open.append(torch.autocast(device.type, dtype=torch.bfloat16))
            self._open[-1].__enter__()

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
