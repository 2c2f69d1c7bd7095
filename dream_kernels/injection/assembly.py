"""Assembly of documents that were read alone into the prefix of one or many pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dream_kernels.injection.context import Prefix
from dream_kernels.injection.windows import places_of

Layers = list[tuple[Tensor, Tensor]]


class PoolAssembly:
    """A prefix under construction: every document is copied once, to its final place.

    Each pool is the header and then its documents, without gaps. Documents may arrive in any
    order, and only one batch of them needs to be in memory beside the prefix.

    Args:
        header: number of tokens before every document.
        lengths: number of tokens of each document.
        pools: for each row of the prefix the indices of its documents.
        device: of the prefix.
    """

    def __init__(
        self,
        header: int,
        lengths: Sequence[int],
        pools: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self.header, self.lengths, self.device = header, lengths, device
        self.has_header = False
        self._places: list[list[tuple[int, int]]] = [[] for _ in lengths]  # (row, begin)
        self._spans = torch.zeros(len(pools), max(map(len, pools)), 2, dtype=torch.long)
        ends = []
        for row, pool in enumerate(pools):
            end = header
            for c, i in enumerate(pool):
                self._places[i].append((row, end))
                self._spans[row, c, 0] = end
                end += lengths[i]
                self._spans[row, c, 1] = end
            ends.append(end)
        self._ends = torch.tensor(ends)
        longest = [max(lengths[i] for i in pool) for pool in pools]
        self._longest = max(longest)
        self._next_position = header + torch.tensor(longest)
        self._positions = places_of([[lengths[i] for i in pool] for pool in pools], header)
        self._layers: Layers = []
        self._whole: Tensor | None = None

    def add_batch(self, layers: Layers, documents: Sequence[int]) -> None:
        """Add documents that were read in one batch, and the header if it is still missing.

        Args:
            layers: keys and values ``[n, Hkv, L, D]`` of each layer, every row the header and one
                document.
            documents: the document of each row.
        """
        self._allocate(layers)
        # (row, first token, row of the prefix, first place, tokens)
        pieces = [
            (row, self.header, *place, self.lengths[i])
            for row, i in enumerate(documents)
            for place in self._places[i]
        ]
        if self.header and not self.has_header:
            pieces += [(0, 0, row, 0, self.header) for row in range(len(self._ends))]
            self.has_header = True
        if not pieces:
            return
        row, token, prefix_row, place, counts = torch.tensor(pieces).unbind(-1)
        inside = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        from_row, from_token, to_row, to_place = (
            field.to(self.device)
            for field in (
                row.repeat_interleave(counts),
                token.repeat_interleave(counts) + inside,
                prefix_row.repeat_interleave(counts),
                place.repeat_interleave(counts) + inside,
            )
        )
        for layer, own in zip(layers, self._layers):
            for states, prefix in zip(layer, own):
                prefix.transpose(1, 2)[to_row, to_place] = states.transpose(1, 2)[
                    from_row, from_token
                ]

    def add_document(self, states: Tensor, document: int) -> None:
        """Add one document's keys and values ``[layers, 2, Hkv, length, D]``."""
        for row, begin in self._places[document]:
            self._copy(states, row, begin)

    def add_header(self, states: Tensor) -> None:
        """Add the header's keys and values ``[layers, 2, Hkv, header, D]``."""
        for row in range(len(self._ends)):
            self._copy(states, row, 0)
        self.has_header = True

    def prefix(self) -> Prefix:
        """Return the prefix, once the header and every document were added."""
        mask = None
        if (self._ends < self._ends.max()).any():
            mask = (torch.arange(int(self._ends.max())) < self._ends[:, None]).to(self.device)
        return Prefix(
            self._layers,
            self._spans.to(self.device),
            self._next_position.to(self.device),
            mask,
            None if self._positions is None else self._positions.to(self.device),
            extent=self.header + self._longest,
            reach=self._longest,
        )

    def _copy(self, states: Tensor, row: int, begin: int) -> None:
        states = states.to(self.device)
        self._allocate([(key[None], value[None]) for key, value in states])
        assert self._whole is not None
        self._whole[:, :, row, :, begin : begin + states.shape[3]] = states

    def _allocate(self, layers: Layers) -> None:
        if self._layers:
            return
        size = len(self._ends), int(self._ends.max())
        like = layers[0][0]
        shapes = {(states.shape[1], states.shape[3]) for layer in layers for states in layer}
        if len(shapes) == 1:
            # One tensor, so that a document goes to all layers in one copy.
            ((heads, width),) = shapes
            self._whole = like.new_zeros(len(layers), 2, size[0], heads, size[1], width)
            self._layers = [(key, value) for key, value in self._whole]
            return
        self._layers = [
            (
                key.new_zeros(size[0], key.shape[1], size[1], key.shape[3]),
                value.new_zeros(size[0], value.shape[1], size[1], value.shape[3]),
            )
            for key, value in layers
        ]
