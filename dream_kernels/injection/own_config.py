"""A model's own copy of its config, so that another attention is set for this model alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dream_kernels.injection.attention import use_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_ATTENTION = "_attn_implementation_internal"


class OwnConfig:
    """Gives every module of a model copies of the configs that it reads.

    Models that were made from one config object share it, and transformers reads from it which
    attention a layer calls. What is set in the copies meanwhile is set in the shared config by
    :meth:`restore`, as it would have been without them.

    Args:
        model: the model.
        attention: name of the registered attention function that it is to call.
    """

    def __init__(self, model: PreTrainedModel, attention: str) -> None:
        self._model = model
        copies: dict[int, Any] = {}
        copy.deepcopy(model.config, copies)
        # A module, its config before, its own copy.
        self._modules: list[tuple[nn.Module, Any, Any]] = [
            (module, config, copies[id(config)])
            for module in model.modules()
            if id(config := module.__dict__.get("config")) in copies
        ]
        # The same for each config, and the copy as it was made.
        self._configs: list[tuple[Any, Any, dict[str, Any]]] = [
            (before, own, dict(vars(own)))
            for before, own in {id(own): (before, own) for _, before, own in self._modules}.values()
        ]
        for module, _, own in self._modules:
            module.config = own
        use_attention(model, attention)

    def restore(self, attention: str) -> None:
        """Put the former configs back, with what was set meanwhile, except the attention."""
        use_attention(self._model, attention)
        for before, own, made in self._configs:
            for name, value in vars(own).items():
                if name != _ATTENTION and (name not in made or value is not made[name]):
                    vars(before)[name] = value
        for module, before, _ in self._modules:
            module.config = before
