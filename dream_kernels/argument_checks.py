"""The checks of single arguments: types, dtypes, shapes, devices and layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dream_kernels.problem import MODES, readable

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int32, torch.int64)


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is recorded, or the tensor has no values: then the call is one node."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
    )


def refuse_transforms() -> None:
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


def require_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if is_traced(value):
        return value
    if value.layout != torch.strided or is_traceable_wrapper_subclass(value):
        kind = type(value).__name__ if value.layout == torch.strided else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor of this process alone, got {kind}")
    return readable(value)


def require_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def check_query(query: Tensor) -> None:
    if query.dim() != 4:
        raise ValueError(f"query must have shape [B, Hq, M, D], got {_shape(query)}")
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be floating point, got {query.dtype}")
    if 0 in query.shape[1::2]:
        raise ValueError(f"query must have heads and a head size, got {_shape(query)}")


def check_keys(
    query: Tensor, key_name: str, key: Tensor, value_name: str, value: Tensor, *, batches: tuple
) -> None:
    for name, tensor in ((key_name, key), (value_name, value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape [B, Hkv, N, D], got {_shape(tensor)}")
        require_like_query(name, tensor, query)
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


def pair(prefix: object) -> tuple[Tensor, Tensor]:
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 2:
        raise TypeError(
            f"prefix must be a (key, value) pair or None, got {type(prefix).__name__}"
            + (f" of {len(prefix)}" if isinstance(prefix, (tuple, list)) else "")
        )
    for i, tensor in enumerate(prefix):
        if tensor is None:
            raise TypeError(f"prefix[{i}] must be a torch.Tensor, got NoneType")
    return prefix[0], prefix[1]


def check_prefix(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> None:
    batch = query.shape[0]
    check_keys(query, "prefix[0]", prefix_key, "prefix[1]", prefix_value, batches=tuple({1, batch}))
    if prefix_key.shape[1] != key.shape[1]:
        raise ValueError(f"prefix must have key's {key.shape[1]} heads, got {_shape(prefix_key)}")
    if prefix_value.shape[3] != value.shape[3]:
        raise ValueError(
            f"prefix[1] must have value's head size {value.shape[3]}, got {_shape(prefix_value)}"
        )


def check_spans(spans: Tensor, query: Tensor) -> None:
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


def check_scores(scores: Tensor, query: Tensor, documents: int) -> None:
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


def check_attention_mask(
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


def check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    if sinks is None:
        return
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be floating point, got {sinks.dtype}")
    if sinks.device != query.device:
        raise ValueError(f"sinks must be on query's device {query.device}, got {sinks.device}")
    if tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks must have shape [Hq] = [{query.shape[1]}], got {_shape(sinks)}")


def check_positions(
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


def check_window_size(window: object, causal: bool) -> None:
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not causal:
        raise ValueError("window needs causal=True, got causal=False")


def check_softcap(softcap: object) -> float:
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
