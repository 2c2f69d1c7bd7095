"""Which models can be injected, and the reasons why others are refused."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from dream_kernels.injection.layers import Layers, source_of
from dream_kernels.injection.states import why_not_continued

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_of(model: object) -> PreTrainedModel:
    """Return the transformers model inside the wrappers of ``torch.compile`` and PEFT.

    Raises:
        TypeError: there is none.
        ValueError: a PEFT model adds tokens of its own.
    """
    from transformers import PreTrainedModel

    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model") and hasattr(inner, "active_peft_config"):
            peft_config: Any = inner.active_peft_config
            if peft_config.is_prompt_learning:
                raise ValueError(
                    f"{type(inner).__name__} cannot be injected: its {peft_config.peft_type.value} "
                    "adds tokens, which document_spans would not count"
                )
            inner = inner.get_base_model()
        else:
            raise TypeError(
                "model must be a transformers PreTrainedModel, or one in torch.compile or a "
                f"PeftModel, got {type(inner).__name__}"
            )
    return inner


def _drops_keywords(model: nn.Module, modules: Mapping[int, nn.Module]) -> str | None:
    """Return the class between the model and its attention that does not pass keywords on.

    The attention needs the documents of its call. That a forward passes keywords on is read from
    its source: it takes ``**kwargs`` and calls something with them. Whether they arrive is checked
    in every call.
    """
    attention = set(modules.values())
    names = {name for name, module in model.named_modules() if module in attention}
    parts = {name[:end] for name in names for end in _ends_of_parts(name)}
    for kind in {type(module) for name, module in model.named_modules() if name in parts}:
        if kind.forward is not nn.Module.forward and not _passes_keywords(kind.forward):
            return kind.__name__
    return None


def _ends_of_parts(name: str) -> list[int]:
    return [0, *(i for i, letter in enumerate(name) if letter == "."), len(name)]


def _passes_keywords(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return False
    function = inspect.unwrap(forward)
    tree = source_of(function)
    if tree is None:
        return True
    functions = {"loss_function", *getattr(function, "__globals__", ())}
    return any(
        keyword.arg is None and _last_name(call.func) not in functions
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    )


def _last_name(called: ast.expr) -> str | None:
    """``f`` of ``f(...)`` and ``x.f(...)``."""
    return getattr(called, "attr", getattr(called, "id", None))


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the model below the head; Gemma 3 of transformers 4.57 is its own ``base_model``."""
    base = model.base_model
    return model.get_decoder() if base is model else base


def cache_keyword(model: nn.Module) -> str:
    """Return what the model's forward calls its cache: transformers renamed it in 5.24."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether ``position_ids`` counts tokens from 0, as reading a prefix needs."""
    for name, module in model.named_modules():
        # RoBERTa and its kin count from one after the index of padding.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return False
    return any(
        "position_ids" in inspect.signature(type(part).forward).parameters
        for part in (model, model.base_model)
    )


def why_not(model: PreTrainedModel, layers: Layers) -> str | None:
    """Return why ``model`` cannot be injected, or None when it can."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and only decoders are supported"
    if not type(model)._can_set_attn_implementation():
        return "it does not use transformers' AttentionInterface"
    parts = getattr(model, "_tp_size", None) or 1
    if parts > 1:
        return (
            f"its heads are split over {parts} processes (tensor parallelism): each would count "
            "its own from 0, and hold a part of the scores' gradient"
        )
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        return "its attention is bidirectional"
    if not layers.attention:
        reasons = dict.fromkeys(layers.refused[layer] for layer in sorted(layers.refused))
        return f"not one of its layers can be: {'; '.join(reasons)}"
    if not hasattr(config, "num_attention_heads"):
        return "its layers have different numbers of heads"
    dropper = _drops_keywords(model, layers.attention)
    if dropper is not None:
        return (
            f"{dropper} does not pass keyword arguments on, by which the attention gets its "
            "documents"
        )
    return None


def why_no_prefix(model: PreTrainedModel, layers: Layers) -> str | None:
    """Return why documents cannot be read apart from what follows them, or None when they can."""
    if not takes_positions(model):
        return "it does not take position_ids that count from 0"
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0) and not all(
        "shared_kv_states" in inspect.signature(type(module).forward).parameters
        for module in layers.attention.values()
    ):
        return "some layers take the keys and values of others from the cache"
    return why_not_continued(model, layers) if layers.states else None


def check_heads(
    heads: Mapping[Any, Sequence[int]], model: PreTrainedModel, layers: Layers
) -> dict[int, list[int]]:
    """Return ``{layer: [head, ...]}`` after checking it against the model.

    Raises:
        TypeError: a layer or head is not an integer.
        ValueError: the model has no such layer or head, scores cannot act in the layer, or a head
            is named twice.
    """
    query_heads = model.config.get_text_config().num_attention_heads
    checked: dict[int, list[int]] = {}
    for layer, layer_heads in heads.items():
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"heads must map layer numbers to lists of heads, got layer {layer!r}")
        if not 0 <= layer < layers.count:
            raise ValueError(
                f"heads names layer {layer}, and the model has layers 0 .. {layers.count - 1}"
            )
        if layer_heads and layer in layers.refused:
            raise ValueError(
                f"heads names layer {layer}, in which scores cannot act: {layers.refused[layer]}; "
                f"they can in layers {sorted(layers.attention)}"
            )
        for head in layer_heads:
            if isinstance(head, bool) or not isinstance(head, int):
                raise TypeError(f"heads of layer {layer} must be integers, got {head!r}")
            if not 0 <= head < query_heads:
                raise ValueError(
                    f"heads names head {head} of layer {layer}, and the model has heads "
                    f"0 .. {query_heads - 1}"
                )
        if len(set(layer_heads)) != len(layer_heads):
            raise ValueError(f"heads names a head of layer {layer} twice: {list(layer_heads)}")
        if layer_heads:
            checked[layer] = sorted(layer_heads)
    return checked
