"""``inject_attention``: the operator in a stock transformers decoder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_kernels.argument_checks import check_mode
from dream_kernels.dispatch import check_impl
from dream_kernels.head_file import HeadFile, read_chosen_heads
from dream_kernels.injection import attention, call, generation, support
from dream_kernels.injection.context import DocumentContext, MassRecorder, Prefix
from dream_kernels.injection.layers import Layers, layers_of
from dream_kernels.injection.own_config import OwnConfig
from dream_kernels.injection.states import continued

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Heads = Mapping[int, Sequence[int]] | HeadFile | str | os.PathLike[str]


class Injection:
    """The operator injected into one model; made by :func:`inject_attention`.

    Attributes:
        model: the injected model, without the wrappers around it.
        heads: ``{layer: [head, ...]}`` that receive the scores.
        mode: how the scores act, ``"reweight"`` or ``"bias"``.
        document_mass: the attention that all documents together get, None for the head's own.
        layers: the model's layers, and why scores cannot act in some of them.
        why_no_prefix: why documents cannot be read apart, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: dict[int, list[int]],
        mode: str,
        document_mass: float | None,
        impl: str,
        layers: Layers,
    ) -> None:
        self.model = model
        self.heads = heads
        self.mode = mode
        self.document_mass, self._impl = document_mass, impl
        _, *self._names = inspect.signature(type(model).forward).parameters
        self.layers = layers
        self.why_no_prefix = support.why_no_prefix(model, layers)
        self._original = attention.base_name(attention.attention_of(model))
        self._config = OwnConfig(model, attention.register(self._original))
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Restore the model; further calls do nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._config.restore(self._original)

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
        self.heads = support.check_heads(_by_layer(heads, top_k), self.model, self.layers)

    @property
    def keeps_states(self) -> bool:
        """Whether layers keep a state, over which padding before a token would pass."""
        return bool(self.layers.states)

    def layers_that_reach(self, tokens: int) -> list[int]:
        """The layers in which scores can act on documents that start ``tokens - 1`` tokens back.

        All that can be injected, except those with a shorter sliding window.
        """
        windows = self.layers.windows
        return [
            layer
            for layer in sorted(self.layers.attention)
            if (window := windows.get(layer)) is None or window >= tokens
        ]

    def read_mass(self, row_weights: Tensor, **inputs: Any) -> Tensor:
        """Return the plain attention mass of every document in every layer and head.

        One forward pass of the model without gradient; no attention matrix is built.

        Args:
            row_weights: ``[B, M]``, how much each row of ``input_ids`` counts in the average;
                each batch element sums to 1, or to 0 to be left out.
            **inputs: the model's inputs with ``document_spans`` and, if wanted,
                ``document_prefix`` and ``document_scores``.

        Returns:
            ``[layers, B, Hq, C]`` float32 on the CPU; 0 in layers in which no scores can act.

        Raises:
            ValueError: there are no documents, or the shapes do not fit.
        """
        recorder = MassRecorder(row_weights)
        with torch.no_grad():
            self.model(**inputs, **{call.RECORDER_KEYWORD: recorder})
        masses = {layer: mass.cpu() for layer, mass in recorder.layers.items()}
        none = torch.zeros_like(next(iter(masses.values())))
        return torch.stack([masses.get(layer, none) for layer in range(self.layers.count)])

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
        output = support.backbone_of(self.model)(**inputs)
        self._after_forward(self.model, (), inputs, output)
        return output.last_hidden_state

    def generate(
        self,
        input_ids: Tensor,
        *,
        document_scores: Tensor | None = None,
        document_spans: Tensor | None = None,
        document_prefix: Prefix | None = None,
        document_first_row: int | None = None,
        **options: Any,
    ) -> Any:
        """Generate with documents: every step is a call of the injected model with them.

        Args:
            input_ids: ``[B, M]``, the prompts; with a prefix only what follows it.
            document_scores: as in :func:`inject_attention`; beams and samples of a prompt share
                the documents of its row.
            document_spans: as in :func:`inject_attention`.
            document_prefix: as in :func:`inject_attention`.
            document_first_row: as in :func:`inject_attention`, counted in ``input_ids``.
            **options: of the model's own ``generate``, such as ``attention_mask`` (of
                ``input_ids``), ``max_new_tokens``, ``num_beams`` and ``do_sample``.

        Returns:
            What the model's own ``generate`` returns, ``[B, M + new tokens]`` by default.

        Raises:
            TypeError: as in a call of the injected model.
            ValueError: likewise, or an option does not go with documents.
        """
        model: Any = self.model
        given = (document_scores, document_spans, document_prefix, document_first_row)
        documents = {k: v for k, v in zip(call.KEYWORDS, given, strict=True) if v is not None}
        if not documents:
            return model.generate(input_ids, **options)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape [B, M], got {list(input_ids.shape)}")
        generation.check_options(self.model, options)
        call.check_first_row(document_first_row, input_ids.shape[1])
        with generation.generating(self.model, len(input_ids), documents):
            return model.generate(input_ids, **options)

    def _before_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        documents = call.take_documents(kwargs)
        given = {**dict(zip(self._names, args)), **kwargs}
        documents = documents or generation.documents_of_step(model, given)
        if not documents:
            return None
        context, changes = call.prepare(
            documents,
            given,
            layers=self.layers,
            why_no_prefix=self.why_no_prefix,
            heads=self.heads,
            query_heads=model.config.get_text_config().num_attention_heads,
            mode=self.mode,
            document_mass=self.document_mass,
            impl=self._impl,
        )
        if context.prefix is not None and context.prefix.states:
            if model.training and model.is_gradient_checkpointing:
                raise ValueError(
                    "a document_prefix that holds states does not go with gradient checkpointing, "
                    "which drops them"
                )
            cache = continued(model, context.prefix.states, _batch_of(given))
            changes[support.cache_keyword(model)] = cache
        return args, {**kwargs, **changes, attention.CONTEXT_KEYWORD: context}

    def _after_forward(
        self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        # The keyword arguments are those that the hook before the forward returned: all that
        # belongs to a call travels with it.
        context: DocumentContext | None = kwargs.get(attention.CONTEXT_KEYWORD)
        if context is None:
            return
        context.finished = True
        if context.prefix is not None and context.prefix.states:
            # Nothing was written back to the cache of this pass: it continues nothing.
            for name in ("cache", "past_key_values", "cache_params"):
                if isinstance(output, dict) and name in output:
                    output[name] = None
        everywhere = context.prefix is not None or context.recorder is not None
        expected = set(self.layers.attention if everywhere else context.heads)
        missed = expected - context.reached
        if missed:
            raise RuntimeError(
                f"the documents did not reach the attention of layers {sorted(missed)}: "
                f"{type(model).__name__} does not pass keyword arguments on to its attention"
            )


def inject_attention(
    model: nn.Module,
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

    Called without them the model computes exactly what it did before. Works with decoders that
    dispatch through transformers' ``AttentionInterface``: Llama, Qwen, Mistral, Gemma, gpt-oss,
    DeepSeek V3, ... (docs/readers.md has them all) and with every cache that keeps all keys, static
    ones included. Sliding windows, soft caps and attention sinks are the model's own; a window that
    would cut a row with scores off from part of a document is refused (``WindowError``). In models
    whose other layers are linear or chunked the heads in layers with full attention can be
    injected. What belongs to a call stays with it, so that threads may share an injected model.

    Args:
        model: the reader; also one that ``torch.compile`` or a ``PeftModel`` wraps, whose forward
            then takes the keyword arguments too.
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
    model = support.decoder_of(model)
    if injection_of(model) is not None:
        reason: str | None = (
            "it is injected already; call remove() on the first injection, or use that one"
        )
    else:
        layers = layers_of(model)
        reason = support.why_not(model, layers)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be injected: {reason}")
    check_mode(mode, document_mass)
    check_impl(impl)
    checked = support.check_heads(_by_layer(heads, top_k), model, layers)
    return Injection(model, checked, mode, document_mass, impl, layers)


def injection_of(model: PreTrainedModel) -> Injection | None:
    """Return the injection of a model, None if it has none."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Injection)), None)


def _batch_of(given: Mapping[str, Any]) -> int:
    inputs = given.get("input_ids")
    return len(given["inputs_embeds"] if inputs is None else inputs)


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
