"""Validation of a call's arguments, and their reduction to a :class:`Problem`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from dream_kernels.argument_checks import (
    check_attention_mask,
    check_keys,
    check_mode,
    check_positions,
    check_prefix,
    check_query,
    check_scores,
    check_sinks,
    check_softcap,
    check_spans,
    check_window_size,
    head_mask,
    is_traced,
    pair,
    refuse_transforms,
    require_tensor,
)
from dream_kernels.problem import Problem, Reading
from dream_kernels.spans import present_documents
from dream_kernels.value_checks import (
    check_logits,
    check_span_values,
    check_window,
    checks_values_of,
)

_ALWAYS = ("query", "key", "value", "scores", "spans")


def _geometry(
    spans: Tensor, mask: Tensor | None, positions: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The fields of a problem that say where documents, tokens and rows are."""
    spans, mask = spans.to(device, torch.long), None if mask is None else mask.bool()
    present = present_documents(spans, mask)
    return spans * present[..., None], mask, None if positions is None else positions.long()


def _checked_geometry(
    spans: Tensor, mask: Tensor | None, positions: Tensor | None, device: torch.device, length: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`_geometry`, with the values, and with no mask where nothing is padding."""
    if checks_values_of(spans):
        check_span_values(spans, length)
    if mask is not None and mask.device.type == "cpu" and mask.all():
        mask = None
    return _geometry(spans, mask, positions, device)


@dataclass(frozen=True)
class _Options:
    """What follows from the arguments that are no tensors, and from shapes, once checked.

    Attributes:
        length: ``T``.
        has_prefix: whether the prefix has keys.
        accumulate: the dtype of scores and sinks.
        fields: of the problem, in the order of :attr:`Problem.options`.
    """

    length: int
    has_prefix: bool
    accumulate: torch.dtype
    fields: dict[str, Any]


# What was checked is not checked again: it depends on nothing else than these keys.
_checked: dict[Hashable, _Options] = {}
_MOST_CHECKED = 4096
_Tensors = dict[str, "Tensor | None"]


def _key_of_checks(tensors: _Tensors, heads: Any, options: tuple[Any, ...]) -> Hashable | None:
    """What the checks of a call without values depend on; None where the call is a rare one."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    try:
        described = [
            None
            if t is None
            else (type(t), t.shape, t.dtype, t.device, t.layout, t.is_neg(), t._is_zerotensor())
            for t in tensors.values()
        ]
        if heads is not None:
            heads = tuple(heads), tuple(map(type, heads))
        key = (*described, heads, *options, *map(type, options))
        hash(key)
    except (TypeError, AttributeError):
        return None
    return key


def _check_options(
    tensors: _Tensors,
    heads: Sequence[int] | Tensor | None,
    mode: str,
    document_mass: float | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> _Options:
    """Check everything but values, and make the tensors readable in place of what was given."""
    for name, tensor in tensors.items():
        if tensor is not None or name in _ALWAYS:
            tensors[name] = require_tensor(name, tensor)
    query, key, value, scores, spans = (cast(Tensor, tensors[name]) for name in _ALWAYS)
    check_query(query)
    check_keys(query, "key", key, "value", value, batches=(query.shape[0],))
    prefix_key, prefix_value = tensors["prefix[0]"], tensors["prefix[1]"]
    prefix_length = 0
    if prefix_key is not None and prefix_value is not None:
        check_prefix(query, key, value, prefix_key, prefix_value)
        prefix_length = prefix_key.shape[2]
    length = key.shape[2] + prefix_length
    check_mode(mode, document_mass)
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    check_spans(spans, query)
    check_scores(scores, query, spans.shape[1])
    check_sinks(tensors["sinks"], query)
    if window is not None:
        check_window_size(window, causal)
    check_positions(tensors["positions"], query.shape[0], length, query.device)
    check_attention_mask(tensors["attention_mask"], query.shape[0], length, query.device)
    fields = {
        "heads": head_mask(heads, query.shape[1]),
        "mode": mode,
        "document_mass": None if document_mass is None else float(document_mass),
        "scale": float(scale),
        "causal": bool(causal),
        "window": window,
        "softcap": None if softcap is None else check_softcap(softcap),
    }
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _Options(length, prefix_length > 0, accumulate, fields)


def build_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    spans: Tensor,
    *,
    mode: str,
    heads: Sequence[int] | Tensor | None,
    document_mass: float | None,
    scale: float | None,
    causal: bool,
    attention_mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    window: int | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    reading: Reading | None = None,
) -> Problem:
    """Check every argument of :func:`dream_kernels.document_attention`.

    Calls of one ``reading`` check and prepare what says where documents and tokens are once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or content.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms()
    prefix_key, prefix_value = (None, None) if prefix is None else pair(prefix)
    tensors: _Tensors = {
        "query": query, "key": key, "value": value, "scores": scores, "spans": spans,
        "prefix[0]": prefix_key, "prefix[1]": prefix_value, "sinks": sinks,
        "positions": positions, "attention_mask": attention_mask,
    }  # fmt: skip
    options = (mode, document_mass, scale, causal, window, softcap)
    which = _key_of_checks(tensors, heads, options)
    known = None if which is None else _checked.get(which)
    tracing = False
    if known is None:
        given = list(tensors.values())
        known = _check_options(tensors, heads, *options)
        tracing = is_traced(query)
        if which is not None and not tracing and all(map(is_, given, tensors.values())):
            if len(_checked) >= _MOST_CHECKED:
                _checked.clear()
            _checked[which] = known
        query, key, value, scores, spans = (cast(Tensor, tensors[name]) for name in _ALWAYS)
        prefix_key, prefix_value, sinks, positions, attention_mask = list(tensors.values())[5:]
    device, length = query.device, known.length
    # While a graph is traced there are no values yet; the graph checks them when it runs.
    if tracing:
        places = _geometry(spans, attention_mask, positions, device)
    else:
        check_logits(scores, sinks)
        given_places = spans, attention_mask, positions
        if reading is None:
            places = _checked_geometry(*given_places, device, length)
        else:
            places = reading.keep(
                ("geometry", length, device), given_places,
                lambda: _checked_geometry(*given_places, device, length),
            )  # fmt: skip
    problem = Problem(
        query,
        key,
        value,
        (scores if scores.dim() == 3 else scores.unsqueeze(1)).to(known.accumulate),
        prefix_key if known.has_prefix else None,
        prefix_value if known.has_prefix else None,
        None if sinks is None else sinks.to(known.accumulate),
        places[0],
        places[1],
        None if window is None else places[2],
        **known.fields,
        reading=Reading() if reading is None else reading,
    )
    if window is not None and not (tracing or problem.empty):
        check_window(problem)
    return problem
