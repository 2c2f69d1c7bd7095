"""``inject_attention``: the operator in a stock transformers decoder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels.dispatch import check_impl
from dream_kernels.head_file import HeadFile, read_chosen_heads
from dream_kernels.injection import attention, support
from dream_kernels.injection.context import DocumentContext, MassRecorder, Prefix
from dream_kernels.validation import check_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Heads = Mapping[int, Sequence[int]] | HeadFile | str | os.PathLike[str]

_KEYWORDS = ("document_scores", "document_spans", "document_prefix", "document_first_row")


class Injection:
    """The operator injected into one model; made by :func:`inject_attention`.

    Attributes:
        model: the injected model.
        heads: ``{layer: [head, ...]}`` that receive the scores.
        mode: how the scores act, ``"reweight"`` or ``"bias"``.
        document_mass: the attention that all documents together get, None for the head's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: dict[int, list[int]],
        mode: str,
        document_mass: float | None,
        impl: str,
    ) -> None:
        self.model = model
        self.heads = heads
        self.mode = mode
        self.document_mass, self._impl = document_mass, impl
        self._recorder: MassRecorder | None = None
        self._context: DocumentContext | None = None
        self._signature = inspect.signature(type(model).forward)
        self._original = attention.attention_of(model)
        attention.use_attention(model, attention.register(self._original))
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def remove(self) -> None:
        """Restore the model; further calls do nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        attention.use_attention(self.model, self._original)

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def use_heads(self, heads: Heads, top_k: int | None = None) -> None:
        """Let the scores act in other heads from now on.

        Args:
            heads: as in :func:`inject_attention`.
            top_k: as in :func:`inject_attention`.

        Raises:
            TypeError: ``heads`` has the wrong form.
            ValueError: the model has no such head, or a head file does not say which are chosen.
        """
        self.heads = support.check_heads(_by_layer(heads, top_k), self.model)

    def read_mass(self, row_weights: Tensor, **inputs: Any) -> Tensor:
        """Return the plain attention mass of every document in every layer and head.

        One forward pass of the model without gradient; no attention matrix is built.

        Args:
            row_weights: ``[B, M]``, how much each row of ``input_ids`` counts in the average;
                each batch element sums to 1, or to 0 to be left out.
            **inputs: the model's inputs with ``document_spans`` and, if wanted,
                ``document_prefix`` and ``document_scores``.

        Returns:
            ``[layers, B, Hq, C]`` float32 on the CPU.

        Raises:
            ValueError: there are no documents, or the shapes do not fit.
        """
        self._recorder = MassRecorder(row_weights)
        try:
            with torch.no_grad():
                self.model(**inputs)
            masses = self._recorder.layers
        finally:
            self._recorder = None
        return torch.stack([masses[layer].cpu() for layer in sorted(masses)])

    def decode(self, **inputs: Any) -> Tensor:
        """Run the decoder without its language-model head.

        Args:
            **inputs: the model's inputs, with ``document_scores`` and what belongs to them.

        Returns:
            The last hidden states ``[B, M, hidden]``.

        Raises:
            ValueError: as the injected model's own forward.
        """
        prepared = self._before_forward(self.model, (), inputs)
        if prepared is not None:
            _, inputs = prepared
        output = self.model.base_model(**inputs)
        self._after_forward(self.model, (), output)
        return output.last_hidden_state

    def _before_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._context = None
        scores, spans, prefix, first_row = (kwargs.pop(name, None) for name in _KEYWORDS)
        if scores is None and spans is None and prefix is None and self._recorder is None:
            return None
        bound = self._signature.bind_partial(model, *args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        inputs = given.get("inputs_embeds")
        if inputs is None:
            inputs = given.get("input_ids")
        if inputs is None:
            raise ValueError("input_ids or inputs_embeds must be given with document_scores")
        batch, rows = inputs.shape[:2]
        first_row = _check_first_row(first_row, rows)
        # Newer transformers name it "cache" and still accept the old name.
        past = given.get("cache")
        if past is None:
            past = given.get("past_key_values")
        past_length = 0 if past is None else int(past.get_seq_length())
        if given.get("cache_position") is not None:
            _check_cache_position(given["cache_position"], past_length, rows)

        if prefix is not None:
            _check_prefix(prefix, batch, len(support.attention_modules(model)))
            if spans is None:
                spans = prefix.spans
            if given.get("position_ids") is None:
                kwargs["position_ids"] = _suffix_positions(
                    prefix, given.get("attention_mask"), batch, past_length, rows, inputs.device
                )
            kwargs.setdefault("use_cache", False)
        elif given.get("position_ids") is not None and given.get("attention_mask") is None:
            _refuse_packing(given["position_ids"])
        if spans is not None and len(spans) == 1:
            spans = spans.expand(batch, -1, -1)
        if (scores is not None or self._recorder is not None) and spans is None:
            raise ValueError("document_scores needs document_spans or a document_prefix with spans")
        if scores is None and spans is not None and prefix is None and self._recorder is None:
            raise ValueError("document_spans needs document_scores")
        if scores is not None and scores.dim() == 4:
            _check_layers_of_scores(scores, len(support.attention_modules(model)))
        self._context = DocumentContext(
            heads=self.heads,
            scores=scores,
            spans=spans,
            attention_mask=_full_mask(
                given.get("attention_mask"), prefix, batch, past_length + rows, inputs.device
            ),
            prefix=prefix,
            mode=self.mode,
            document_mass=self.document_mass,
            impl=self._impl,
            length=past_length + rows,
            cache=past,
            first_row=first_row,
            recorder=self._recorder,
        )
        kwargs[attention.CONTEXT_KEYWORD] = self._context
        return args, kwargs

    def _after_forward(self, model: PreTrainedModel, args: Any, output: Any) -> None:
        context, self._context = self._context, None
        if context is None:
            return
        everywhere = context.prefix is not None or context.recorder is not None
        expected = set(support.attention_modules(model)) if everywhere else set(self.heads)
        missed = expected - context.reached
        if missed:
            raise RuntimeError(
                f"the documents did not reach the attention of layers {sorted(missed)}: "
                f"{type(model).__name__} does not pass keyword arguments on to its attention"
            )


def inject_attention(
    model: PreTrainedModel,
    heads: Heads,
    *,
    top_k: int | None = None,
    mode: str = "reweight",
    document_mass: float | None = None,
    impl: str = "auto",
) -> Injection:
    """Let per-document scores act in some attention heads of a transformers decoder.

    The model's forward then takes four more keyword arguments:

    - ``document_scores``: ``[B, C]``, ``[B, Hq, C]`` or ``[B, layers, Hq, C]``, one logit per
      document, or one for each head, or for each head of every layer; the gradient flows back
      into it, as 0 where a head is not among ``heads``;
    - ``document_spans``: ``[B, C, 2]``, the range of each document, counted in tokens from the
      start of the prefix, or of ``input_ids`` without one;
    - ``document_prefix``: a :class:`Prefix` of documents that were read before. ``input_ids`` is
      then only what follows them, ``attention_mask`` its padding, and ``document_spans`` may be
      omitted;
    - ``document_first_row``: rows of ``input_ids`` before this one attend plainly, 0 by default.
      Without effect where there are no scores.

    Called without them the model computes exactly what it did before. Works with every decoder
    that dispatches through transformers' ``AttentionInterface``: Llama, Qwen2, Qwen3, Mistral,
    Gemma 3, ... Sliding windows are exact as long as the window holds all keys; beyond it the
    call is refused.

    Args:
        model: the reader.
        heads: ``{layer: [head, ...]}``, a :class:`HeadFile`, or the path of a head file.
        top_k: how many of the best heads of a head file; None for those that it says were chosen.
        mode: as in :func:`dream_kernels.document_attention`.
        document_mass: as in :func:`dream_kernels.document_attention`.
        impl: as in :func:`dream_kernels.document_attention`.

    Returns:
        The injection: ``remove()`` it, or use it in a ``with`` statement.

    Raises:
        TypeError: ``model`` is not a transformers model, or ``heads`` has the wrong form.
        ValueError: the model cannot be injected (the message says why), or has no such head; or a
            head file is a ranking in which none are chosen, and ``top_k`` is not given.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    reason = support.why_not(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be injected: {reason}")
    check_mode(mode, document_mass)
    check_impl(impl)
    checked = support.check_heads(_by_layer(heads, top_k), model)
    return Injection(model, checked, mode, document_mass, impl)


def _by_layer(heads: Heads, top_k: int | None) -> Mapping[int, Sequence[int]]:
    if isinstance(heads, (str, os.PathLike)):
        return read_chosen_heads(heads, top_k).by_layer()
    if isinstance(heads, HeadFile):
        return heads.by_layer(top_k)
    if top_k is not None:
        raise ValueError(f"top_k is for head files, got {top_k} and a {type(heads).__name__}")
    if not isinstance(heads, Mapping):
        raise TypeError(
            "heads must be {layer: [head, ...]}, a HeadFile or a path, "
            f"got {type(heads).__name__}"
        )
    return heads


def _check_layers_of_scores(scores: Tensor, layers: int) -> None:
    if scores.shape[1] != layers:
        raise ValueError(
            f"document_scores of four dimensions must have shape [B, {layers}, Hq, C], one entry "
            f"for each layer of the model, got {list(scores.shape)}"
        )


def _check_first_row(first_row: object, rows: int) -> int:
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


def _check_prefix(prefix: object, batch: int, layers: int) -> None:
    if not isinstance(prefix, Prefix):
        raise TypeError(f"document_prefix must be a Prefix, got {type(prefix).__name__}")
    if len(prefix.layers) != layers:
        raise ValueError(
            f"document_prefix must hold {layers} layers, as the model does, got "
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


def _suffix_positions(
    prefix: Prefix, mask: Tensor | None, batch: int, past: int, rows: int, device: torch.device
) -> Tensor:
    """Position ids ``[B, M]`` of a suffix, continuing after the prefix; padding has none."""
    start = prefix.next_position.to(device)[:, None]
    if mask is None:
        return (start + past + torch.arange(rows, device=device)).expand(batch, -1)
    return start + (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -rows:]


def _refuse_packing(position_ids: Tensor) -> None:
    if position_ids.shape[-1] > 1 and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids restart inside a row: packed sequences are not supported with "
            "document_scores; give an attention_mask if the gaps are padding"
        )
