"""Validation of a call's arguments, and their reduction to a :class:`Problem`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dream_kernels.problem import MODES, Problem, Reading, readable
from dream_kernels.spans import present_documents
from dream_kernels.value_checks import (
    check_logits,
    check_span_values,
    check_window,
    checks_values_of,
)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int32, torch.int64)
_ALWAYS = ("query", "key", "value", "scores", "spans")


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is recorded, or the tensor has no values: then the call is one node."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
    )


def _refuse_transforms() -> None:
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "torch.jit.trace cannot record document_attention: use torch.compile or torch.export"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "document_attention does not run under the transforms of torch.func (grad, jvp, "
            "vmap, ...): use torch.autograd, or transform dream_kernels.reference.attend"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _require_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if is_traced(value):
        return value
    if value.layout != torch.strided or is_traceable_wrapper_subclass(value):
        kind = type(value).__name__ if value.layout == torch.strided else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor of this process alone, got {kind}")
    return readable(value)


def _require_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def _check_query(query: Tensor) -> None:
    if query.dim() != 4:
        raise ValueError(f"query must have shape [B, Hq, M, D], got {_shape(query)}")
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be floating point, got {query.dtype}")
    if 0 in query.shape[1::2]:
        raise ValueError(f"query must have heads and a head size, got {_shape(query)}")


def _check_keys(
    query: Tensor, key_name: str, key: Tensor, value_name: str, value: Tensor, *, batches: tuple
) -> None:
    for name, tensor in ((key_name, key), (value_name, value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape [B, Hkv, N, D], got {_shape(tensor)}")
        _require_like_query(name, tensor, query)
    if key.shape[:3] != value.shape[:3] or value.shape[3] == 0:
        raise ValueError(
            f"{value_name} must have {key_name}'s shape {_shape(key)}, the last dimension apart, "
            f"got {_shape(value)}"
        )
    if key.shape[0] not in batches:
        expected = " or ".join(str(b) for b in batches)
        raise ValueError(f"{key_name} must have batch {expected}, got {_shape(key)}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{key_name} must have query's head size {query.shape[3]}, got {_shape(key)}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{key_name} must have a number of heads that divides query's {query.shape[1]}, "
            f"got {key.shape[1]}"
        )


def _pair(prefix: object) -> tuple[Tensor, Tensor]:
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 2:
        raise TypeError(
            f"prefix must be a (key, value) pair or None, got {type(prefix).__name__}"
            + (f" of {len(prefix)}" if isinstance(prefix, (tuple, list)) else "")
        )
    for i, tensor in enumerate(prefix):
        if tensor is None:
            raise TypeError(f"prefix[{i}] must be a torch.Tensor, got NoneType")
    return prefix[0], prefix[1]


def _check_prefix(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> None:
    batch = query.shape[0]
    _check_keys(
        query, "prefix[0]", prefix_key, "prefix[1]", prefix_value, batches=tuple({1, batch})
    )
    if prefix_key.shape[1] != key.shape[1]:
        raise ValueError(f"prefix must have key's {key.shape[1]} heads, got {_shape(prefix_key)}")
    if prefix_value.shape[3] != value.shape[3]:
        raise ValueError(
            f"prefix[1] must have value's head size {value.shape[3]}, got {_shape(prefix_value)}"
        )


def _check_spans(spans: Tensor, query: Tensor) -> None:
    if spans.dtype not in INTEGER_DTYPES:
        raise TypeError(f"spans must be int32 or int64, got {spans.dtype}")
    if spans.dim() != 3 or spans.shape[2] != 2 or spans.shape[0] != query.shape[0]:
        raise ValueError(
            f"spans must have shape [B, C, 2] with B = {query.shape[0]}, got {_shape(spans)}"
        )
    if spans.shape[1] == 0:
        raise ValueError("spans must name at least one document (C >= 1), got C = 0")
    if spans.device != query.device and spans.device.type != "cpu":
        raise ValueError(
            f"spans must be on the CPU or on query's device {query.device}, got {spans.device}"
        )


def _check_scores(scores: Tensor, query: Tensor, documents: int) -> None:
    batch, heads = query.shape[:2]
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.device != query.device:
        raise ValueError(f"scores must be on query's device {query.device}, got {scores.device}")
    if tuple(scores.shape) not in {(batch, documents), (batch, heads, documents)}:
        raise ValueError(
            f"scores must have shape [B, C] = [{batch}, {documents}] or [B, Hq, C] = "
            f"[{batch}, {heads}, {documents}], got {_shape(scores)}"
        )


def head_mask(heads: Sequence[int] | Tensor | None, query_heads: int) -> tuple[bool, ...]:
    """Return for every query head whether the ``heads`` argument names it.

    Raises:
        TypeError: ``heads`` is neither a sequence of integers nor bools.
        ValueError: a head is out of range or named twice, or a bool form has the wrong length.
    """
    if heads is None:
        return (True,) * query_heads
    values = heads.tolist() if isinstance(heads, Tensor) else list(heads)
    if (isinstance(heads, Tensor) and heads.dtype == torch.bool) or (
        values and all(isinstance(v, bool) for v in values)
    ):
        if len(values) != query_heads:
            raise ValueError(f"heads as bool must have length {query_heads}, got {len(values)}")
        return tuple(values)
    mask = [False] * query_heads
    for head in values:
        if isinstance(head, bool) or not isinstance(head, int):
            raise TypeError(f"heads must be integers or bools, got {type(head).__name__}")
        if not 0 <= head < query_heads:
            raise ValueError(f"heads must lie in 0 .. {query_heads - 1}, got {head}")
        if mask[head]:
            raise ValueError(f"heads must name each head once, got {head} twice")
        mask[head] = True
    return tuple(mask)


def _check_attention_mask(
    mask: Tensor | None, batch: int, length: int, device: torch.device
) -> None:
    if mask is None:
        return
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integer (1 = token, 0 = padding), got {mask.dtype}"
        )
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask must have shape [B, P + N] = [{batch}, {length}], got {_shape(mask)}"
        )
    if mask.device != device:
        raise ValueError(f"attention_mask must be on query's device {device}, got {mask.device}")


def _check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    if sinks is None:
        return
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be floating point, got {sinks.dtype}")
    if sinks.device != query.device:
        raise ValueError(f"sinks must be on query's device {query.device}, got {sinks.device}")
    if tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks must have shape [Hq] = [{query.shape[1]}], got {_shape(sinks)}")


def _check_positions(
    positions: Tensor | None, batch: int, length: int, device: torch.device
) -> None:
    if positions is None:
        return
    if positions.dtype not in INTEGER_DTYPES:
        raise TypeError(f"positions must be int32 or int64, got {positions.dtype}")
    if tuple(positions.shape) != (batch, length):
        raise ValueError(
            f"positions must have shape [B, P + N] = [{batch}, {length}], got {_shape(positions)}"
        )
    if positions.device != device:
        raise ValueError(f"positions must be on query's device {device}, got {positions.device}")


def _check_window(window: object, causal: bool) -> None:
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not causal:
        raise ValueError("window needs causal=True, got causal=False")


def _check_softcap(softcap: object) -> float:
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a float or None, got {type(softcap).__name__}")
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    return float(softcap)


def check_mode(mode: str, document_mass: float | None) -> None:
    """Raise unless ``mode`` is known and ``document_mass`` fits it."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if document_mass is None:
        return
    if mode != "reweight":
        raise ValueError(f"document_mass needs mode='reweight', got mode={mode!r}")
    if isinstance(document_mass, bool) or not isinstance(document_mass, (int, float)):
        raise TypeError(f"document_mass must be a float, got {type(document_mass).__name__}")
    if not 0.0 < document_mass <= 1.0:
        raise ValueError(f"document_mass must lie in (0, 1], got {document_mass}")


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
            tensors[name] = _require_tensor(name, tensor)
    query, key, value, scores, spans = (cast(Tensor, tensors[name]) for name in _ALWAYS)
    _check_query(query)
    _check_keys(query, "key", key, "value", value, batches=(query.shape[0],))
    prefix_key, prefix_value = tensors["prefix[0]"], tensors["prefix[1]"]
    prefix_length = 0
    if prefix_key is not None and prefix_value is not None:
        _check_prefix(query, key, value, prefix_key, prefix_value)
        prefix_length = prefix_key.shape[2]
    length = key.shape[2] + prefix_length
    check_mode(mode, document_mass)
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    _check_spans(spans, query)
    _check_scores(scores, query, spans.shape[1])
    _check_sinks(tensors["sinks"], query)
    if window is not None:
        _check_window(window, causal)
    _check_positions(tensors["positions"], query.shape[0], length, query.device)
    _check_attention_mask(tensors["attention_mask"], query.shape[0], length, query.device)
    fields = {
        "heads": head_mask(heads, query.shape[1]),
        "mode": mode,
        "document_mass": None if document_mass is None else float(document_mass),
        "scale": float(scale),
        "causal": bool(causal),
        "window": window,
        "softcap": None if softcap is None else _check_softcap(softcap),
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
        _refuse_transforms()
    prefix_key, prefix_value = (None, None) if prefix is None else _pair(prefix)
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
