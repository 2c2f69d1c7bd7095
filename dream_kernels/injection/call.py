"""What one call of an injected model gives about its documents, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dream_kernels.argument_checks import is_traced
from dream_kernels.injection.context import DocumentContext, Prefix
from dream_kernels.injection.layers import Layers
from dream_kernels.problem import Reading

KEYWORDS = ("document_scores", "document_spans", "document_prefix", "document_first_row")
# Inputs of models that read more than text.
_OF_IMAGES = ("pixel_values", "pixel_values_videos", "mm_token_type_ids")
# For the injection's own use: a MassRecorder.
RECORDER_KEYWORD = "document_recorder"


def take_documents(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the keyword arguments about documents from those of a call and return them.

    Empty when the call is a plain one: ``document_first_row`` alone means nothing.
    """
    taken = {
        name: value
        for name in (*KEYWORDS, RECORDER_KEYWORD)
        if (value := kwargs.pop(name, None)) is not None
    }
    return {} if taken.keys() <= {"document_first_row"} else taken


def cache_of(given: dict[str, Any]) -> tuple[Any, int]:
    """The cache among a call's arguments, None if there is none, and how many tokens it has."""
    # Newer transformers name it "cache" and still accept the old name.
    past = given.get("cache")
    if past is None:
        past = given.get("past_key_values")
    return past, 0 if past is None else int(past.get_seq_length())


def prepare(
    documents: dict[str, Any],
    given: dict[str, Any],
    *,
    layers: Layers,
    why_no_prefix: str | None,
    **options: Any,
) -> tuple[DocumentContext, dict[str, Any]]:
    """Check a call and return its context, and the keyword arguments that it changes.

    Args:
        documents: what :func:`take_documents` returned.
        given: all other arguments of the call, by name.
        layers: of the model.
        why_no_prefix: see :func:`dream_kernels.injection.support.why_no_prefix`.
        **options: the fields of the context that belong to the injection.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is missing, or has the wrong shape or content.
    """
    scores, spans, prefix, first_row = (documents.get(name) for name in KEYWORDS)
    recorder = documents.get(RECORDER_KEYWORD)
    inputs = given.get("inputs_embeds")
    if inputs is None:
        inputs = given.get("input_ids")
    if inputs is None:
        raise ValueError("input_ids or inputs_embeds must be given with document_scores")
    if given.get("encoder_hidden_states") is not None:
        raise ValueError("encoder_hidden_states is not supported with document_scores")
    for name in _OF_IMAGES:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} is not supported with document_scores: tokens of an image see later ones"
            )
    batch, rows = inputs.shape[:2]
    first_row = check_first_row(first_row, rows)
    past, past_length = cache_of(given)
    if given.get("cache_position") is not None:
        _check_cache_position(given["cache_position"], past_length, rows)

    changes: dict[str, Any] = {}
    positions = None
    if prefix is not None:
        if why_no_prefix is not None:
            raise ValueError(f"document_prefix does not go with this model: {why_no_prefix}")
        _check_prefix(prefix, batch, len(layers.attention))
        if spans is None:
            spans = prefix.spans
        local = _local_positions(
            prefix, given.get("attention_mask"), batch, past_length + rows, inputs.device
        )
        own = given.get("position_ids")
        if own is None:
            changes["position_ids"] = local[:, -rows:]
        else:
            local = torch.cat([local[:, :-rows], own.to(local).expand(batch, -1)], dim=1)
        positions = _all_positions(prefix, local)
        if "use_cache" not in given:
            changes["use_cache"] = False
        if layers.states:
            _check_continued(prefix, layers, past, given)
    elif given.get("position_ids") is not None and given.get("attention_mask") is None:
        _refuse_packing(given["position_ids"])
    if spans is not None and len(spans) == 1:
        spans = spans.expand(batch, -1, -1)
    if (scores is not None or recorder is not None) and spans is None:
        raise ValueError("document_scores needs document_spans or a document_prefix with spans")
    if scores is None and spans is not None and prefix is None and recorder is None:
        raise ValueError("document_spans needs document_scores")
    if scores is not None and scores.dim() == 4:
        _check_layers_of_scores(scores, layers.count)
    context = DocumentContext(
        scores=scores,
        spans=spans,
        attention_mask=_full_mask(
            given.get("attention_mask"), prefix, batch, past_length + rows, inputs.device
        ),
        prefix=prefix,
        length=past_length + rows,
        cache=past,
        first_row=first_row,
        recorder=recorder,
        places=layers.places(),
        positions=positions,
        own_spans=prefix is not None and documents.get("document_spans") is None,
        positions_given=prefix is not None and given.get("position_ids") is not None,
        reading=None if is_traced(inputs) else Reading(),
        **options,
    )
    return context, changes


def _check_layers_of_scores(scores: Tensor, layers: int) -> None:
    if scores.shape[1] != layers:
        raise ValueError(
            f"document_scores of four dimensions must have shape [B, {layers}, Hq, C], one entry "
            f"for each layer of the model, got {list(scores.shape)}"
        )


def check_first_row(first_row: object, rows: int) -> int:
    """Return ``document_first_row`` after checking it, 0 for None."""
    if first_row is None:
        return 0
    if isinstance(first_row, bool) or not isinstance(first_row, int):
        raise TypeError(f"document_first_row must be an int, got {type(first_row).__name__}")
    if not 0 <= first_row <= rows:
        raise ValueError(f"document_first_row must lie in 0 .. {rows}, got {first_row}")
    return first_row


def _check_cache_position(places: Tensor, past: int, rows: int) -> None:
    """transformers before 5 lets the caller choose the places in the cache."""
    if places.tolist() != list(range(past, past + rows)):
        raise ValueError(
            f"cache_position must continue the {past} tokens of the cache with document_scores, "
            f"got {places.tolist()}"
        )


def _check_continued(prefix: Prefix, layers: Layers, past: Any, given: dict[str, Any]) -> None:
    """Refuse what would not continue the states of a prefix as one sequence does."""
    if prefix.states.keys() != layers.states.keys():
        raise ValueError(
            f"document_prefix must hold the states of layers {sorted(layers.states)}, got those "
            f"of {sorted(prefix.states)}"
        )
    if past is not None or given.get("use_cache"):
        raise ValueError(
            "a cache is not supported with a document_prefix that holds states: pass "
            "use_cache=False and no cache"
        )
    mask = given.get("attention_mask")
    if mask is not None and not mask.bool().cummin(dim=1).values.eq(mask.bool()).all():
        raise ValueError(
            "attention_mask must have its padding at the end with a document_prefix that holds "
            "states: they would continue over padding before a token"
        )


def _check_prefix(prefix: object, batch: int, layers: int) -> None:
    if not isinstance(prefix, Prefix):
        raise TypeError(f"document_prefix must be a Prefix, got {type(prefix).__name__}")
    if len(prefix.layers) != layers:
        raise ValueError(
            f"document_prefix must hold {layers} layers with attention, as the model does, got "
            f"{len(prefix.layers)}"
        )
    if prefix.batch not in (1, batch):
        raise ValueError(f"document_prefix must have batch 1 or {batch}, got {prefix.batch}")


def _full_mask(
    local: Tensor | None, prefix: Prefix | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Padding mask over prefix and local keys, ``[B, P + length]``, or None."""
    if local is not None and local.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape [B, {length}] with document_scores, got "
            f"{list(local.shape)}; 4D masks are not supported"
        )
    if local is not None and tuple(local.shape) != (batch, length):
        raise ValueError(
            f"attention_mask must have shape [{batch}, {length}], got {list(local.shape)}"
        )
    if prefix is None:
        return None if local is None else local.bool()
    if local is None and prefix.mask is None:
        return None
    if local is None:
        local = torch.ones(batch, length, dtype=torch.bool, device=device)
    before = prefix.mask
    if before is None:
        before = torch.ones(1, prefix.length, dtype=torch.bool, device=device)
    return torch.cat([before.to(device).expand(batch, -1), local.bool()], dim=1)


def _local_positions(
    prefix: Prefix, mask: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Position ids ``[B, length]`` of what follows the prefix; padding has none."""
    start = prefix.next_position.to(device)[:, None]
    if mask is None:
        return (start + torch.arange(length, device=device)).expand(batch, -1)
    return start + (mask.to(device).long().cumsum(-1) - 1).clamp(min=0)


def _all_positions(prefix: Prefix, local: Tensor) -> Tensor:
    """Positions ``[B, P + length]`` of prefix and local keys."""
    before = prefix.positions
    if before is None:
        before = torch.arange(prefix.length)[None]
    return torch.cat([before.to(local.device).expand(len(local), -1), local], dim=1)


def _refuse_packing(position_ids: Tensor) -> None:
    if position_ids.shape[-1] > 1 and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids restart inside a row: packed sequences are not supported with "
            "document_scores; give an attention_mask if the gaps are padding"
        )
