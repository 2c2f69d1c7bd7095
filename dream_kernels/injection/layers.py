"""Which layers of a model the operator can stand in for, read from its modules and their source.

What a layer hands to the attention function decides: the operator computes causal attention with
padding. A layer with another mask, a bias, or several calls is left to the model's own attention.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# Kinds of layers whose attention sees all that came before, or a window of it.
_KINDS = frozenset({"full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding"})
# What an attention function is given besides its tensors.
_KEYWORDS = frozenset(
    {
        "attention_mask", "dropout", "head_mask", "is_causal", "output_attentions", "position_ids",
        "s_aux", "scaling", "sliding_window", "softcap",
    }
)  # fmt: skip

_WITHOUT_STATE = frozenset({"mlp", "moe"})
# What a module's forward calls the cache.
_CACHES = frozenset(
    {"cache", "cache_params", "layer_past", "past_key_value", "past_key_values", "state"}
)


@dataclass(frozen=True)
class Layers:
    """The layers of a model.

    Attributes:
        count: how many there are.
        attention: the attention module of each layer whose heads can receive scores.
        refused: why those of the other layers cannot.
        windows: the sliding window of each layer of ``attention`` that has one.
        states: what layers have of earlier tokens besides the keys and values of ``attention``.
    """

    count: int
    attention: dict[int, nn.Module]
    refused: dict[int, str]
    windows: dict[int, int]
    states: dict[int, str]

    def places(self) -> dict[int, int]:
        """The index of each layer of ``attention`` among them."""
        return {layer: place for place, layer in enumerate(sorted(self.attention))}


def layers_of(model: nn.Module) -> Layers:
    """Return the layers of a transformers model."""
    config: Any = model.config
    config = config.get_text_config()
    count = config.num_hidden_layers
    uses = Counter(
        module
        for _, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "layer_idx", None), int)
        and _calls_of_attention(_forward_of(module)) is not None
    )
    modules: dict[int, list[nn.Module]] = defaultdict(list)
    for module in uses:
        modules[module.layer_idx].append(module)
    kinds = getattr(config, "layer_types", None) or [None] * count
    attention, refused = {}, {}
    for layer in range(count):
        kind = kinds[layer] if layer < len(kinds) else None
        found = modules.get(layer, [])
        reason = _why_not_kind(kind, found)
        if reason is None and uses[found[0]] > 1:
            reason = "it shares its attention module with other layers"
        reason = reason or _why_not_module(found[0])
        if reason is None:
            attention[layer] = found[0]
        else:
            refused[layer] = reason
    states = {
        layer: reason
        for layer, reason in refused.items()
        if not (layer < len(kinds) and kinds[layer] in _WITHOUT_STATE)
    }
    states |= _states_beside(model, attention)
    windows = {
        layer: window
        for layer, module in attention.items()
        if (window := _window_of(module, config)) is not None
    }
    return Layers(count, attention, refused, windows, states)


def _window_of(module: nn.Module, config: Any) -> int | None:
    """The window that a layer gives to its attention, None if it gives none."""
    calls = _calls_of_attention(_forward_of(module)) or []
    if not any(keyword.arg == "sliding_window" for call in calls for keyword in call.keywords):
        return None
    # A module without a window of its own takes that of the config.
    window: Any = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return window


def _states_beside(model: nn.Module, attention: dict[int, nn.Module]) -> dict[int, str]:
    """Layers of ``attention`` in which another part uses the cache as well."""
    states, known = {}, set(attention.values())
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if layer in attention and module not in known and _takes_cache(_forward_of(module)):
            inner = (part for part in module.modules() if part is not module)
            if not any(part in known or _takes_cache(_forward_of(part)) for part in inner):
                states[layer] = f"{type(module).__name__} has a state"
    return states


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    return inspect.unwrap(type(module).forward)


@functools.cache
def _takes_cache(forward: Callable[..., Any]) -> bool:
    return not _CACHES.isdisjoint(inspect.signature(forward).parameters)


def _why_not_kind(kind: str | None, found: list[nn.Module]) -> str | None:
    if kind is not None and kind not in _KINDS:
        return f"its type is {kind}"
    if not found:
        return "it has no attention that is dispatched"
    if len(found) > 1:
        return f"it has {len(found)} attention modules"
    return None


def _why_not_module(module: nn.Module) -> str | None:
    if getattr(module, "is_causal", True) is False:
        reason: str | None = "is not causal"
    else:
        reason = _why_not_source(_forward_of(module))
    return reason and f"{type(module).__name__} {reason}"


@functools.cache
def _why_not_source(forward: Callable[..., Any]) -> str | None:
    calls = _calls_of_attention(forward) or []
    if len(calls) > 1:
        return "attends more than once"
    if _writes_elsewhere(forward):
        return "is used more than once in a pass"
    for call in calls:
        unknown = {keyword.arg for keyword in call.keywords if keyword.arg} - _KEYWORDS
        if unknown:
            return f"gives its attention {', '.join(sorted(map(str, unknown)))}"
        if _computes_mask(forward, call):
            return "computes a mask of its own"
    return None


@functools.cache
def _calls_of_attention(forward: Callable[..., Any]) -> list[ast.Call] | None:
    """The calls of a dispatched attention function in a forward; None where there is none.

    Without its source a class is taken for one with an attention if its name says so.
    """
    tree = source_of(forward)
    if tree is None:
        return [] if forward.__qualname__.split(".")[0].endswith("Attention") else None
    names = {
        ast.unparse(target)
        for target, value in _assignments(tree)
        if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(value)
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    ]
    return calls or None


def _writes_elsewhere(forward: Callable[..., Any]) -> bool:
    """Whether keys go to other places of the cache than the layer's own."""
    tree = source_of(forward)
    return tree is not None and any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and len(node.args) > 2
        and ast.unparse(node.args[2]) != "self.layer_idx"
        for node in ast.walk(tree)
    )


def _computes_mask(forward: Callable[..., Any], call: ast.Call) -> bool:
    """Whether the mask is anything but what the layer was given."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"]
    mask = given[0] if given else call.args[4] if len(call.args) > 4 else None
    if not isinstance(mask, ast.Name):
        return True
    tree = source_of(forward)
    assert tree is not None
    return any(
        isinstance(target, ast.Name) and target.id == mask.id and not _selects(value)
        for target, value in _assignments(tree)
    )


def _selects(value: ast.expr) -> bool:
    """Whether an expression only picks one of the values that there are."""
    if isinstance(value, ast.IfExp):
        return _selects(value.body) and _selects(value.orelse)
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Attribute) and value.func.attr == "get"
    return isinstance(value, (ast.Name, ast.Attribute, ast.Subscript))


def _assignments(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield target, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
        elif isinstance(node, ast.AugAssign):
            yield node.target, ast.BinOp(node.target, node.op, node.value)


@functools.cache
def source_of(forward: Callable[..., Any]) -> ast.AST | None:
    """Return the parsed source of a forward, None where it cannot be had."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError):
        return None
