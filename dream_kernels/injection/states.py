"""Prefixes of models with layers that keep a state: linear attention, state spaces, convolutions.

The state at the end of the documents is read once, with the model's own cache, and every suffix
continues from a copy of it. That the copies are not written back keeps them for the backward pass.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels.injection.layers import Layers

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Model types whose layers continue a cached state over several tokens exactly as in one sequence.
CONTINUED = frozenset(
    {
        "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lara_mini", "lfm2",
        "lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "bailing_hybrid", "zaya",
    }
)  # fmt: skip
# The first release in which they do.
_SINCE = (5, 24)

States = dict[int, Any]


def why_not_continued(model: PreTrainedModel, layers: Layers) -> str | None:
    """Return why a prefix cannot hold the state of some layers, or None when it can."""
    import transformers

    layer, what = min(layers.states.items())
    reason = f"layer {layer} cannot continue from keys and values: {what}"
    if model.config.get_text_config().model_type not in CONTINUED:
        return reason
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if version < _SINCE:
        return f"{reason} (it can in transformers {'.'.join(map(str, _SINCE))})"
    return None


def empty_cache(model: PreTrainedModel) -> Cache:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def states_of(cache: Any, layers: Layers) -> States:
    """The layers of a cache that hold a state, without keys and values."""
    found = {}
    for index, layer in enumerate(cache.layers):
        if index in layers.states and hasattr(layer, "conv_states"):
            own = copy.copy(layer)
            if hasattr(own, "keys"):
                own.keys, own.values, own.is_initialized = None, None, False
            found[index] = own
    return found


def of_rows(states: States, rows: Any) -> States:
    """The states of some rows; states of one row serve all of them."""
    return {
        index: _with(layer, lambda state: state if len(state) == 1 else state[rows])
        for index, layer in states.items()
    }


def continued(model: PreTrainedModel, states: States, batch: int) -> Cache:
    """A cache for one pass of ``batch`` suffixes, which continues ``states`` and leaves them."""
    cache = empty_cache(model)
    for index, layer in states.items():
        own = _with(layer, lambda state: state.expand(batch, *state.shape[1:]).clone())
        # Handed out and not written back: no later pass continues it, and a write would change
        # what the backward pass needs.
        own.update_conv_state = functools.partial(_joined, own)
        own.update_recurrent_state = _unchanged
        cache.layers[index] = own
    return cache


def _with(layer: Any, change: Any) -> Any:
    own = copy.copy(layer)
    for name in ("conv_states", "recurrent_states"):
        states: dict[int, Tensor | None] = getattr(layer, name)
        setattr(own, name, {i: s if s is None else change(s) for i, s in states.items()})
    own.has_previous_state = dict(layer.has_previous_state)
    return own


def _joined(layer: Any, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
    return torch.cat([layer.conv_states[state_idx], conv_states], dim=-1)


def _unchanged(recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
    return recurrent_states
