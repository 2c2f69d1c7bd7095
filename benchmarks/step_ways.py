"""The ways to compute one DREAM training step.

A way reads the documents (or does not) and then predicts the targets, leaving the gradient of the
loss in the scores. The rest, retriever and optimiser, is the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dream_kernels import Prefix
from dream_kernels.injection.attention import attention_of, use_attention

from .adapters.eager import reweight
from .step_models import StepSetup

_NAIVE = "dream_benchmarks_naive"


class Stopwatch:
    """Seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Way(Protocol):
    """One way.

    Attributes:
        name: in tables and records.
        note: what it does.
        context: ``"joint"`` or ``"independent"``: ways of one context compute the same loss.
    """

    context: str

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str: ...

    def read(self, setup: StepSetup, watch: Stopwatch) -> Any:
        """Read the documents; the result is passed to :meth:`predict`."""

    def predict(self, setup: StepSetup, read: Any, scores: Tensor, watch: Stopwatch) -> float:
        """Return the loss and leave its gradient in ``scores.grad``."""


@dataclass
class _NaiveState:
    """What the hooked attention needs to know about the current sequence."""

    heads: dict[int, list[int]]
    scores: Tensor
    one_hot: Tensor
    first_row: int


@dataclass
class FullSequence:
    """Every query reads all documents in one sequence of its own; all rows carry gradients.

    Attributes:
        fused: with the operator; otherwise the reader's eager attention with a hook that reweights
            the attention matrix, and autograd.
        context: ``"independent"`` hides the documents from each other with a dense mask, which
            makes it the oracle of independent reading.
        limit: predict at most so many queries; the loop frees the memory of each.
    """

    fused: bool
    context: str = "joint"
    limit: int | None = None
    _state: _NaiveState | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return "full sequence, our operator" if self.fused else "naive"

    @property
    def note(self) -> str:
        how = "our operator" if self.fused else "eager attention, hooked"
        return f"each query reads all documents in its own sequence; {how}; autograd through it all"

    def read(self, setup: StepSetup, watch: Stopwatch) -> None:
        """Nothing: documents are read with every query."""

    def predict(self, setup: StepSetup, read: None, scores: Tensor, watch: Stopwatch) -> float:
        reader, total = setup.reader, 0.0
        with watch("tokenisation"):
            header, documents, queries, targets = tokens(setup)
        count = sum(map(len, targets))
        for b, (query, target) in enumerate(list(zip(queries, targets))[: self.limit]):
            ids = [*header, *(t for d in documents for t in d), *query, *target]
            inputs = torch.tensor([ids], device=setup.device)
            labels = inputs.clone()
            labels[:, : -len(target)] = -100
            with watch("reader"):
                if self.fused:
                    loss = reader.model(
                        input_ids=inputs, labels=labels, document_scores=scores[b : b + 1],
                        document_spans=_spans(header, documents, setup.device), use_cache=False,
                    ).loss  # fmt: skip
                else:
                    loss = self._hooked(setup, inputs, labels, scores[b : b + 1])
                loss = loss * len(target) / count
                loss.backward()
            total += loss.item()
        return total

    def _hooked(self, setup: StepSetup, ids: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        header, documents, _, _ = tokens(setup)
        spans = _spans(header, documents, setup.device)[0]
        length, first_row = ids.shape[1], int(spans.max())
        positions = torch.arange(length, device=setup.device)
        of_key = torch.bucketize(positions, spans[:, 1].contiguous(), right=True)
        of_key[positions < spans[0, 0]] = len(spans)
        extra: dict[str, Any] = {}
        if self.context == "independent":
            extra = _hide_from_each_other(positions, of_key, spans, setup)
        state = _NaiveState(
            setup.reader.injection.heads,
            scores,
            nn.functional.one_hot(of_key, len(spans) + 1).float(),
            first_row,
        )
        with _hooked_attention(setup.reader.model, state):
            output = setup.reader.model(input_ids=ids, labels=labels, use_cache=False, **extra)
        return output.loss


@dataclass
class WithPrefix:
    """Documents are read once without gradient; only query and target carry gradients.

    Attributes:
        name: in tables and records.
        note: what it does.
        context: how documents are read.
        shared: whether all queries share one pool, or each has one of its own.
        cached: whether the documents were read in an earlier step.
    """

    name: str
    note: str
    context: str = "joint"
    shared: bool = True
    cached: bool = False
    _cache: Prefix | None = field(default=None, repr=False)

    def read(self, setup: StepSetup, watch: Stopwatch) -> Prefix:
        if self._cache is not None:
            return self._cache
        reader, documents = setup.reader, setup.documents
        pools = None if self.shared else [list(range(len(documents)))] * len(setup.rows)
        before, reader.context = reader.context, self.context
        try:
            with watch("reading documents"):
                prefix = reader.read(documents, pools)
        finally:
            reader.context = before
        if self.cached:
            self._cache = prefix
        return prefix

    def predict(self, setup: StepSetup, read: Prefix, scores: Tensor, watch: Stopwatch) -> float:
        with watch("reader"):
            reading = setup.reader(read, setup.queries, setup.targets, scores)
            reading.loss.backward()
        return reading.loss.item()


def make_ways() -> list[Way]:
    """New instances of all ways, the naive one first; a cached way keeps its documents."""
    return [
        FullSequence(fused=False),
        FullSequence(fused=True),
        WithPrefix("prefix, pool per query", "each query's documents are read once", shared=False),
        WithPrefix("prefix, shared pool", "the batch's documents are read once"),
        WithPrefix(
            "independent documents", "each document of the shared pool is read alone",
            context="independent",
        ),
        WithPrefix(
            "independent documents, cached", "the same, read in an earlier step",
            context="independent", cached=True,
        ),
    ]  # fmt: skip


def run_step(setup: StepSetup, way: Way, watch: Stopwatch) -> float:
    """One training step up to the optimiser; returns the loss and leaves the gradients."""
    with watch("tokenisation"):
        batch = setup.collator(setup.rows)
    read = way.read(setup, watch)
    with watch("retriever forward"):
        queries, documents = (
            setup.retriever(_features(batch, name, setup.device))["sentence_embedding"].float()
            for name in ("query", "document")
        )
        similarity = nn.functional.normalize(queries, dim=-1) @ (
            nn.functional.normalize(documents, dim=-1).T
        )
        scores = similarity / setup.temperature
    # A leaf, so that the reader's backward and the retriever's are timed apart.
    leaf = scores.detach().requires_grad_()
    loss = way.predict(setup, read, leaf, watch)
    with watch("retriever backward"):
        scores.backward(leaf.grad)
    return loss


def update(setup: StepSetup, watch: Stopwatch) -> None:
    """The rest of the step: the optimiser, which clears the gradients."""
    with watch("optimiser"):
        nn.utils.clip_grad_norm_(setup.trained, 1.0)
        setup.optimizer.step()
        setup.optimizer.zero_grad()


def gradient_of(setup: StepSetup) -> Tensor:
    """The retriever's gradient as one vector, a copy."""
    return torch.cat([p.grad.flatten().double() for p in setup.trained if p.grad is not None])


def tokens(
    setup: StepSetup,
) -> tuple[list[int], list[list[int]], list[list[int]], list[list[int]]]:
    """Header, documents, queries and targets as the reader's tokens."""
    own = setup.reader.tokens
    return (
        own.header,
        own.documents(setup.documents),
        own.queries(setup.queries),
        own.targets(setup.targets),
    )


def _features(batch: dict[str, Any], name: str, device: torch.device) -> dict[str, Any]:
    return {
        key.removeprefix(f"{name}_"): value.to(device)
        for key, value in batch.items()
        if key.startswith(f"{name}_") and isinstance(value, Tensor)
    }


def _spans(header: list[int], documents: list[list[int]], device: torch.device) -> Tensor:
    """``[1, C, 2]``: the ranges of the documents after the header."""
    lengths = torch.tensor([len(d) for d in documents], device=device)
    ends = len(header) + lengths.cumsum(0)
    return torch.stack([ends - lengths, ends], -1)[None]


def _hide_from_each_other(
    positions: Tensor, of_key: Tensor, spans: Tensor, setup: StepSetup
) -> dict[str, Any]:
    """Mask and positions that make a sequence read its documents independently."""
    causal = positions <= positions[:, None]
    inside = of_key < len(spans)
    other = inside & inside[:, None] & (of_key != of_key[:, None])
    dtype = setup.reader.model.dtype
    mask = torch.zeros(len(positions), len(positions), device=setup.device, dtype=dtype)
    mask = mask.masked_fill(~causal | other, torch.finfo(dtype).min)
    start = int(spans[0, 0])
    moved = positions.clone()
    for begin, end in spans.tolist():
        moved[begin:end] -= begin - start
    after = int(spans.max())
    moved[after:] -= after - start - int((spans[:, 1] - spans[:, 0]).max())
    return {"attention_mask": mask[None, None], "position_ids": moved[None]}


@contextmanager
def _hooked_attention(model: Any, state: _NaiveState) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
        scaling: float, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        logits = query @ key.transpose(-1, -2) * scaling + attention_mask
        weights = torch.softmax(logits.float(), -1)
        heads = state.heads.get(int(module.layer_idx), [])  # type: ignore[arg-type]
        if heads:
            index = torch.tensor(heads, device=weights.device)
            plain = weights[:, index]
            rows = torch.arange(plain.shape[2], device=plain.device)[:, None]
            scored = reweight(plain, state.scores, state.one_hot)
            chosen = torch.where(rows >= state.first_row, scored, plain)
            weights = weights.index_copy(1, index, chosen)
        return (weights.to(value.dtype) @ value).transpose(1, 2), None

    AttentionInterface.register(_NAIVE, attention)
    AttentionMaskInterface.register(_NAIVE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = attention_of(model)
    use_attention(model, _NAIVE)
    try:
        yield
    finally:
        use_attention(model, before)
