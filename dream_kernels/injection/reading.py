"""Reading documents once, without gradient, into a :class:`Prefix`.

The hidden states of the documents do not depend on the scores, because only rows after the
documents are scored. So their keys and values are computed once and every suffix attends to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dream_kernels.injection import attention, support
from dream_kernels.injection.assembly import Layers, PoolAssembly
from dream_kernels.injection.context import DocumentContext, Prefix
from dream_kernels.injection.inject import Injection, inject_attention, injection_of
from dream_kernels.injection.states import States, empty_cache, states_of
from dream_kernels.value_checks import check_span_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DocumentStates(Protocol):
    """A store of the keys and values of documents that one model read alone."""

    def get(self, header: Sequence[int], document: Sequence[int]) -> Tensor | None:
        """Return ``[layers, 2, Hkv, L, D]``, keys and values of a document after ``header``.

        ``L`` is the document's own length. An empty document means the header itself. None when
        it is not in the store.
        """

    def put(self, header: Sequence[int], document: Sequence[int], states: Tensor) -> None:
        """Store what :meth:`get` is to return; ``states`` shares no memory with other tensors."""


@torch.no_grad()
def read_jointly(
    model: PreTrainedModel,
    input_ids: Tensor,
    spans: Tensor,
    attention_mask: Tensor | None = None,
) -> Prefix:
    """Read documents in one sequence, each seeing those before it.

    Args:
        model: the reader, injected or not, in a wrapper or not.
        input_ids: ``[1, P]`` for a pool that all suffixes share, ``[B, P]`` for one pool each.
        spans: ``[1 or B, C, 2]``, the ranges of the documents in ``input_ids``.
        attention_mask: ``[1 or B, P]``, 0 for padding at the end of a row, or None.

    Returns:
        The prefix; a suffix continues at the position after the last token.

    Raises:
        ValueError: padding precedes a token, the spans do not fit, or the model keeps more of
            earlier tokens than keys and values.
    """
    check_span_values(spans, input_ids.shape[1])
    mask = None
    next_position = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    if attention_mask is not None and not attention_mask.all():
        mask = attention_mask.bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("attention_mask of a prefix must have its padding at the end")
        next_position = mask.sum(1)
    with _injected(model) as injection:
        layers, states = _keys_and_values(injection, input_ids, mask)
    starts = spans[..., 0][spans[..., 1] > spans[..., 0]].tolist()
    length = input_ids.shape[1]
    return Prefix(
        layers,
        spans.long(),
        next_position,
        mask,
        extent=length,
        reach=length - min(starts, default=length),
        states=states,
    )


@torch.no_grad()
def read_independently(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    pools: Sequence[Sequence[int]] | None = None,
    header: Sequence[int] = (),
    batch_size: int = 32,
    store: DocumentStates | None = None,
) -> Prefix:
    """Read every document alone, all at the same positions.

    Each document sees ``header`` and itself. The header's keys and values come out the same for
    all documents, so the prefix holds them once, outside the spans.

    Args:
        model: the reader, injected or not, in a wrapper or not.
        documents: token ids of each document, at least one each.
        pools: for each suffix the indices of its documents; None for one pool of all documents
            that every suffix shares.
        header: token ids before every document, such as the beginning-of-sequence
            token that readers use as an attention sink.
        batch_size: number of documents in one forward pass.
        store: queried for every document before it is read, and given what was read. A document
            from the store equals one that is read again, up to the rounding of matrix products,
            which depends on the shape of the batch.

    Returns:
        The prefix; a suffix continues at the position after the longest document of its pool.

    Raises:
        ValueError: there are no documents, one is empty, a pool names one that does not exist, or
            there is a store and keys and values are not all of one shape.
    """
    lengths = [len(document) for document in documents]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"documents must hold at least one token each, got lengths {lengths}")
    rows = [list(range(len(documents)))] if pools is None else [list(pool) for pool in pools]
    if any(not pool for pool in rows):
        raise ValueError("pools must name at least one document each")
    if any(not 0 <= i < len(documents) for pool in rows for i in pool):
        raise ValueError(f"pools must name documents 0 .. {len(documents) - 1}, got {rows}")
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    assembly = PoolAssembly(len(header), lengths, rows, device)
    with _injected(model) as injection:
        if injection.keeps_states and injection.why_no_prefix is None:
            raise ValueError(
                f"documents cannot be read independently by {type(injection.model).__name__}: what "
                f"layer {min(injection.layers.states)} keeps of one continues with the next; read "
                "them jointly"
            )
        _read_missing(injection, assembly, documents, header, batch_size, store)
    return assembly.prefix()


@contextmanager
def _injected(model: PreTrainedModel) -> Iterator[Injection]:
    """The injection of a model, one without heads where it has none."""
    injection = injection_of(support.decoder_of(model))
    if injection is not None:
        yield injection
        return
    with inject_attention(model, {}) as injection:
        yield injection


def _read_missing(
    injection: Injection,
    assembly: PoolAssembly,
    documents: Sequence[Sequence[int]],
    header: Sequence[int],
    batch_size: int,
    store: DocumentStates | None,
) -> None:
    """Read what is not in the store, in batches, into the assembly."""
    device = assembly.device
    missing = list(range(len(documents)))
    if store is not None:
        missing = [i for i in missing if not _from_store(assembly, store, header, documents[i], i)]
        if header and (states := store.get(header, ())) is not None:
            assembly.add_header(states)
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        layers = _read_alone(injection, header, [documents[i] for i in batch], device)
        assembly.add_batch(layers, batch)
        if store is not None:
            _into_store(store, header, [documents[i] for i in batch], layers)
        del layers  # before the next batch is read
    if header and not assembly.has_header:
        layers = _read_alone(injection, header, [[]], device)
        assembly.add_batch(layers, [])
        if store is not None:
            _into_store(store, header, [], layers)


def _from_store(
    assembly: PoolAssembly,
    store: DocumentStates,
    header: Sequence[int],
    document: Sequence[int],
    index: int,
) -> bool:
    states = store.get(header, document)
    if states is not None:
        assembly.add_document(states, index)
    return states is not None


def _into_store(
    store: DocumentStates,
    header: Sequence[int],
    documents: Sequence[Sequence[int]],
    layers: Layers,
) -> None:
    """Store the documents of a batch, and the header from the first of them."""
    if len({states.shape for layer in layers for states in layer}) > 1:
        raise ValueError("store needs a model whose layers all have keys and values of one shape")
    begin = len(header)
    if header and store.get(header, ()) is None:
        store.put(header, (), _stack(layers, 0, slice(begin)))
    for row, document in enumerate(documents):
        store.put(header, document, _stack(layers, row, slice(begin, begin + len(document))))


def _stack(layers: Layers, row: int, place: slice) -> Tensor:
    return torch.stack([states[row, :, place] for layer in layers for states in layer]).unflatten(
        0, (len(layers), 2)
    )


def _read_alone(
    injection: Injection,
    header: Sequence[int],
    documents: Sequence[Sequence[int]],
    device: torch.device,
) -> Layers:
    """Keys and values ``[n, Hkv, L, D]`` of documents after the header, padded at the end."""
    width = len(header) + max(map(len, documents))
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros(len(documents), width, dtype=torch.bool)
    for i, document in enumerate(documents):
        tokens = [*header, *document]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = True
    return _keys_and_values(injection, ids.to(device), mask)[0]


def _keys_and_values(
    injection: Injection, input_ids: Tensor, mask: Tensor | None
) -> tuple[Layers, States]:
    """Run the decoder without its language-model head and return what every attention received.

    A cache may hold something else, such as the projections from which keys are computed.
    """
    model, layers, reason = injection.model, injection.layers, injection.why_no_prefix
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot read documents into a prefix: {reason}")
    if layers.states and mask is not None and not mask.all():
        raise ValueError(
            f"the documents of {type(model).__name__} must be read without padding, over which "
            f"the state of layer {min(layers.states)} would continue"
        )
    received: dict[int, tuple[Tensor, Tensor]] = {}
    context = DocumentContext.plain(input_ids.shape[1], received)
    cache = empty_cache(model) if layers.states else None
    backbone = support.backbone_of(model)
    backbone(
        input_ids=input_ids,
        attention_mask=None if mask is None else mask.long().to(input_ids.device),
        use_cache=cache is not None,
        **{attention.CONTEXT_KEYWORD: context, support.cache_keyword(backbone): cache},
    )
    states = {} if cache is None else states_of(cache, layers)
    if states.keys() != layers.states.keys():
        raise ValueError(
            f"{type(model).__name__} cannot read documents into a prefix: its cache does not hold "
            f"the states of layers {sorted(layers.states.keys() - states.keys())}"
        )
    return [received[layer] for layer in sorted(layers.attention)], states
