"""The attention function that transformers calls, and its registration.

Each implementation ``base`` that a model may use gets one registered name, ``dream_<base>``.
Without a document context it calls ``base`` with exactly the arguments that it received, so an
injected model without scores computes what it did before, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_kernels import api
from dream_kernels.argument_checks import is_traced
from dream_kernels.injection.call import KEYWORDS
from dream_kernels.injection.context import DocumentContext
from dream_kernels.injection.windows import check_window, effective_window
from dream_kernels.value_checks import checks_values_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT_KEYWORD = "document_context"
_NAME = "dream_"
# Keyword arguments of attention functions that change what is computed.
_UNSUPPORTED = (
    "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "position_bias", "indices", "block_indices",
    "sinks",
)  # fmt: skip


def base_name(name: str) -> str:
    """The implementation under a registered name: a model may be made from an injected config."""
    return name.removeprefix(_NAME)


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention function that a model calls.

    transformers has no public getter, so this module alone reads and sets the private one.
    """
    return model.config.get_text_config()._attn_implementation


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let a model call a registered attention function, see :func:`attention_of`.

    The form with a dict leaves configs within this one alone.
    """
    model.config.get_text_config()._attn_implementation = {"": name}


def register(base: str) -> str:
    """Register the attention and mask functions over ``base`` and return their name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = _NAME + base
    AttentionInterface.register(name, _make_attention(base))
    # A registered attention without a mask function gets no mask at all, which would silently
    # ignore the padding.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def base_attention(module: nn.Module, base: str) -> Callable[..., Any]:
    """Return the function that the module itself would call for implementation ``base``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    namespace = sys.modules[type(module).__module__]
    if base == "eager":
        return namespace.eager_attention_forward
    # A modelling file may declare functions of its own under the same names.
    return getattr(namespace, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[base]


def _make_attention(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        context: DocumentContext | None = kwargs.pop(CONTEXT_KEYWORD, None)
        if context is not None:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            _refuse_a_second_call(context, layer, module)
            context.reached.add(layer)
            if context.states is not None:
                context.states[layer] = key.contiguous(), value.contiguous()
            heads = context.heads.get(layer, [])
            scored = context.prefix is not None or (heads and context.scores is not None)
            if context.recorder is not None or scored:
                own_key, own_value = _written(context, layer, key, value)
                _refuse_parts_of_heads(context, layer, query)
                _refuse_what_the_operator_cannot(layer, kwargs)
                window = kwargs.get("sliding_window")
                _refuse_other_masks(context, layer, attention_mask, base, window)
            if context.recorder is not None:
                _record_mass(context, layer, query, own_key, kwargs)
            if scored:
                return _document_attention(
                    context, layer, heads, query, own_key, own_value, kwargs
                ), None
        elif any(name in kwargs for name in KEYWORDS):
            raise RuntimeError(
                "arguments about documents reached the attention without the injected model's own "
                "call: use model(...) or injection.decode(...), not model.forward or a part of it"
            )
        return base_attention(module, base)(module, query, key, value, attention_mask, **kwargs)

    attention.__name__ = f"{_NAME}{base}_attention_forward"
    return attention


def _document_attention(
    context: DocumentContext,
    layer: int,
    heads: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend through the operator; returns ``[B, M, Hq, D]`` as transformers expects."""
    rows, first = query.shape[2], context.first_row
    all_scores, formula = context.scores_of(layer), _formula(context, layer, query, kwargs)
    if all_scores is None or context.spans is None or not heads:
        first = rows
    if first < rows and formula["window"] is not None:
        check_window(context, layer, formula["window"], rows)

    def attend(begin: int, end: int) -> Tensor:
        """Attend with rows ``begin .. end``, all of them scored or none."""
        own, scores, spans = heads, all_scores, context.spans
        if begin < first or scores is None or spans is None:
            # Plain attention over prefix and local keys: one absent document and no scored head.
            own = []
            scores, spans = _no_documents(context, query)
        local = key.shape[2] - rows + end
        seen = {
            name: formula[name][:, : formula[name].shape[1] - rows + end]
            for name in ("attention_mask", "positions")
            if formula[name] is not None
        }
        return api.attend(
            context.reading,
            context.impl,
            _places(query, begin, end),
            _places(key, 0, local),
            _places(value, 0, local),
            scores.to(query.device),
            spans.to(query.device),
            mode=context.mode,
            heads=own,
            document_mass=context.document_mass,
            **{**formula, **seen},
        )

    if first in (0, rows):
        return attend(0, rows).transpose(1, 2).contiguous()
    # Rows before the first scored one see no later key, so two calls cost as much as one.
    return torch.cat([attend(0, first), attend(first, rows)], dim=2).transpose(1, 2).contiguous()


def _no_documents(context: DocumentContext, query: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``[B, 1]`` and spans ``[B, 1, 2]`` of one absent document."""
    batch, device = len(query), query.device

    def make() -> tuple[Tensor, Tensor]:
        spans = torch.zeros(batch, 1, 2, dtype=torch.long, device=device)
        return torch.zeros(batch, 1, device=device), spans

    reading = None if is_traced(query) else context.reading
    return make() if reading is None else reading.keep(("none", batch, device), (), make)


def _refuse_a_second_call(context: DocumentContext, layer: int, module: nn.Module) -> None:
    if layer in context.reached and not context.finished:
        raise ValueError(
            f"layer {layer} ({type(module).__name__}) attends more than once in one pass, which is "
            "not supported with document_scores"
        )


def _refuse_other_masks(
    context: DocumentContext, layer: int, mask: Any, base: str, window: int | None
) -> None:
    """Raise if the model's own mask hides other keys than padding, later ones and those too far.

    Each mask of a pass is read once, where contents are checked.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return
    # On an accelerator those are read that transformers itself does not make so: not of booleans,
    # though the attention is not its eager one.
    read = checks_values_of(mask) or (base != "eager" and mask.dtype != torch.bool)
    if not read or is_traced(mask):
        return
    if any(mask is known and window == width for known, width in context.masks):
        return
    rows, length = mask.shape[2], context.length
    visible = mask[..., :length] if mask.dtype == torch.bool else mask[..., :length] == 0
    places = torch.arange(length, device=mask.device)
    own = places[length - rows :, None]
    expected = places <= own
    if window is not None:
        expected &= places > own - window
    real_rows = torch.ones(1, rows, dtype=torch.bool, device=mask.device)
    if context.attention_mask is not None:
        local = context.attention_mask[:, -length:].to(mask.device)
        expected, real_rows = expected & local[:, None], local[:, -rows:]
    same = (visible == expected[..., None, :, :]) | ~real_rows[:, None, :, None]
    if not same.all():
        within = "" if window is None else f" within {window} keys"
        raise ValueError(
            f"layer {layer} attends with a mask that is not causal attention with padding{within}, "
            "which is all that is supported with document_scores"
        )
    context.masks.append((mask, window))


def _refuse_parts_of_heads(context: DocumentContext, layer: int, query: Tensor) -> None:
    """Raise where each process has some heads of a layer, and counts them from 0."""
    if query.shape[1] != context.query_heads:
        raise ValueError(
            f"layer {layer} must have the {context.query_heads} heads of the model's config, got "
            f"{query.shape[1]}: tensor parallelism is not supported with document_scores"
        )


def _written(
    context: DocumentContext, layer: int, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of the tokens so far: spans count from the first of them.

    A static cache hands out all its places, those that were not written yet included.
    """
    held, tokens = key.shape[2], context.length
    if held == tokens:
        return key, value
    if held > tokens and _writes_from_the_start(context.cache, layer):
        return key[:, :, :tokens], value[:, :, :tokens]
    cache = "the pass has no cache" if context.cache is None else type(context.cache).__name__
    raise ValueError(
        f"layer {layer} must see the {tokens} tokens of this pass and its cache, got {held} keys "
        f"({cache}): caches that drop or reorder keys, such as those of sliding windows, are not "
        "supported with document_scores"
    )


def _writes_from_the_start(cache: Any, layer: int) -> bool:
    from transformers.cache_utils import StaticLayer

    layers = getattr(cache, "layers", ())
    return layer < len(layers) and isinstance(layers[layer], StaticLayer)


def _places(states: Tensor, begin: int, end: int) -> Tensor:
    return states if end - begin == states.shape[2] else states[:, :, begin:end]


def _record_mass(
    context: DocumentContext, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> None:
    assert context.recorder is not None and context.spans is not None
    mass = api.mass_of_documents(
        context.reading,
        context.impl,
        query,
        key,
        context.spans.to(query.device),
        **_formula(context, layer, query, kwargs),
    )
    context.recorder.record(layer, mass)


def _refuse_what_the_operator_cannot(layer: int, kwargs: dict[str, Any]) -> None:
    """Raise if the model asks its attention for something that the operator does not support."""
    if kwargs.get("dropout"):
        raise ValueError(
            f"layer {layer} drops attention weights (dropout {kwargs['dropout']}): call "
            "model.eval(), or set attention_dropout to 0 in its config"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"layer {layer}: {name} is not supported with document_scores")


def _formula(
    context: DocumentContext, layer: int, query: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What the model's own attention does besides attending, as arguments of the operator."""
    window = effective_window(context, kwargs.get("sliding_window"))
    mask, positions = context.attention_mask, context.positions
    return {
        "scale": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
        "window": window,
        "positions": None if positions is None or window is None else positions.to(query.device),
        "attention_mask": None if mask is None else mask.to(query.device),
        "prefix": context.prefix_of(layer),
        "causal": True,
    }
