"""What a forward pass of an injected model hands to its attention layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dream_kernels.injection.states import States, of_rows
from dream_kernels.problem import Reading


@dataclass(frozen=True)
class Prefix:
    """Keys and values of documents that were read once, to be attended to by many suffixes.

    Nothing here is copied, expanded or joined when it is used, and no gradient flows into it.

    Attributes:
        layers: for every layer with attention ``(key, value)`` of ``[1 or B, Hkv, P, D]``; batch 1
            is one pool shared by every row of a suffix batch.
        spans: ``[1 or B, C, 2]`` int64, the range of each document in the prefix.
        next_position: ``[1 or B]`` int64, the position id at which a suffix starts.
        mask: ``[1 or B, P]`` bool, False for padding, or None when there is none; ``[B, P]`` over
            a shared pool hides documents from some rows.
        positions: ``[1 or B, P]`` int64, the position of every token, from which the windows of a
            model count; None where they count up from 0.
        extent: the greatest ``next_position`` if the host knows it, otherwise None.
        reach: the most tokens from the start of a document to ``next_position``, likewise.
        states: what layers without attention keep of the documents, by layer, batch 1 or B; empty
            for most models.
    """

    layers: list[tuple[Tensor, Tensor]]
    spans: Tensor
    next_position: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    extent: int | None = None
    reach: int | None = None
    states: States = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        if self.mask is None or len(self.mask) != self.batch:
            return self.batch * self.length
        return int(self.mask.sum())

    @property
    def documents(self) -> int:
        return self.spans.shape[1]

    def farthest(self) -> int:
        """The most tokens from the start of a document to ``next_position``, see ``reach``."""
        if self.reach is not None:
            return self.reach
        start, end = self.spans.unbind(-1)
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.length, device=start.device)[None]
        first = positions.expand(len(start), -1).gather(1, start.clamp(max=self.length - 1))
        distance = self.next_position[:, None] - first
        return int(distance.masked_fill(end == start, 0).max())

    def of_rows(self, rows: Tensor) -> Prefix:
        """The prefix of some suffixes of a batch; a shared prefix serves all of them.

        Args:
            rows: their indices; the pools of consecutive rows are not copied.
        """
        place: slice | Tensor = rows
        if (rows.diff() == 1).all():
            place = slice(int(rows[0]), int(rows[-1]) + 1)

        def pick(field: Tensor) -> Tensor:
            return field if len(field) == 1 else field[place]

        return Prefix(
            [(pick(key), pick(value)) for key, value in self.layers],
            pick(self.spans),
            pick(self.next_position),
            None if self.mask is None else pick(self.mask),
            None if self.positions is None else pick(self.positions),
            self.extent,
            self.reach,
            of_rows(self.states, place),
        )


class MassRecorder:
    """Collects the plain attention mass of the documents, averaged over chosen rows."""

    def __init__(self, row_weights: Tensor) -> None:
        self.row_weights = row_weights  # [B, M], summing to 1 over the rows of each batch element
        self.layers: dict[int, Tensor] = {}

    def record(self, layer: int, mass: Tensor) -> None:
        """Add a layer's mass ``[B, Hq, M, C]``."""
        weights = self.row_weights.to(device=mass.device, dtype=mass.dtype)
        self.layers[layer] = torch.einsum("bhmc,bm->bhc", mass, weights)


@dataclass
class DocumentContext:
    """Passed as one keyword argument from the model's forward to every attention layer.

    Attributes:
        heads: ``{layer: [head, ...]}`` that receive the scores.
        query_heads: of every layer.
        scores: ``[B, C]``, ``[B, Hq, C]`` or ``[B, layers, Hq, C]``, or None when no scores act
            in this pass.
        spans: ``[B, C, 2]``, or None when there are no documents in this pass.
        attention_mask: ``[B, T]`` bool over prefix and local keys, or None.
        prefix: keys and values before the local ones, or None.
        mode: as in :func:`dream_kernels.document_attention`.
        document_mass: as in :func:`dream_kernels.document_attention`.
        impl: as in :func:`dream_kernels.document_attention`.
        length: tokens of this pass and of its cache, those of the prefix not counted.
        cache: the model's cache, or None.
        positions: ``[B, T]``, the positions of prefix and local keys, or None where they count up.
        own_spans: whether the spans are those of the prefix.
        positions_given: whether the caller chose the positions of the local keys.
        places: the index of each layer with attention among them.
        first_row: the first row of the local tokens that the scores act on.
        recorder: collects document masses, or None.
        states: collects the keys and values of every layer, or None.
        reached: the layers whose attention has received this context; detects models that drop it.
        finished: whether the pass is over. Layers are called again by gradient checkpointing alone.
        needed_window: the least window in which scored rows see the documents in full, once known.
        masks: the model's own masks that agree with ``attention_mask``.
        reading: what the calls of the operator in all layers share; None in a traced graph.
    """

    heads: dict[int, list[int]]
    query_heads: int
    scores: Tensor | None
    spans: Tensor | None
    attention_mask: Tensor | None
    prefix: Prefix | None
    mode: str
    document_mass: float | None
    impl: str
    length: int
    cache: Any = None
    positions: Tensor | None = None
    own_spans: bool = False
    positions_given: bool = False
    places: dict[int, int] = field(default_factory=dict)
    first_row: int = 0
    recorder: MassRecorder | None = None
    states: dict[int, tuple[Tensor, Tensor]] | None = None
    reached: set[int] = field(default_factory=set)
    finished: bool = False
    needed_window: int | None = None
    masks: list[tuple[Tensor, int | None]] = field(default_factory=list)
    reading: Reading | None = None

    @classmethod
    def plain(cls, length: int, states: dict[int, tuple[Tensor, Tensor]]) -> DocumentContext:
        """A pass of ``length`` tokens without documents that collects keys and values."""
        return cls(
            heads={},
            query_heads=0,
            scores=None,
            spans=None,
            attention_mask=None,
            prefix=None,
            mode="reweight",
            document_mass=None,
            impl="auto",
            length=length,
            states=states,
        )

    @property
    def total(self) -> int:
        """Number of keys, those of the prefix included."""
        return self.length + (0 if self.prefix is None else self.prefix.length)

    def prefix_of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the prefix in a layer, None without a prefix."""
        return None if self.prefix is None else self.prefix.layers[self.places[layer]]

    def scores_of(self, layer: int) -> Tensor | None:
        """The scores that act in a layer: ``[B, C]`` or ``[B, Hq, C]``."""
        if self.scores is None or self.scores.dim() != 4:
            return self.scores
        return self.scores[:, layer]
