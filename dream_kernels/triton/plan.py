"""The plan of a reading: work lists, made once on the device and shared by its calls."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dream_kernels.problem import Problem, contents
from dream_kernels.triton.blocks import COUNTS
from dream_kernels.triton.launcher import run
from dream_kernels.triton.tuning import bucket
from dream_kernels.triton.work_list import (
    PLACES,
    list_documents_kernel,
    list_keys_kernel,
    weights_kernel,
)

# Positions and tiles of a program that lists them, and documents that a program scans together.
LISTED_KEYS, LISTED_TILES, LISTED_DOCUMENTS = 1024, 64, 1024


def cdiv(n: int, size: int) -> int:
    """How many parts of a size ``n`` takes; Triton's own function is made for kernels."""
    return -(-n // size)


@dataclass(frozen=True)
class Documents:
    """What ``list_documents_kernel`` writes for tiles of one size, at most ``limit`` tiles."""

    tiles: Tensor
    shorts: Tensor
    counts: Tensor
    places: Tensor
    limit: int


class Plan:
    """The work lists of the problems of one reading that have the same keys and rows.

    They depend on the tensors that say where documents and tokens are, and on sizes: all layers,
    the backward and all tile shapes share what they have in common.
    """

    def __init__(self, problem: Problem) -> None:
        # Not the problem itself, whose keys and values would live as long.
        self.batch, self.documents = problem.batch, problem.documents
        self.length, self.prefix_length = problem.total_length, problem.prefix_length
        self.device = problem.spans.device
        self._lists: dict[tuple[int, int], Documents] = {}
        self._weights: dict[Hashable, tuple[Tensor, Tensor]] = {}
        spans, mask, positions = problem.spans.contiguous(), problem.mask, problem.positions
        self._arguments: dict[str, Any] = {
            "spans": spans, "positions": None if positions is None else positions.contiguous(),
            # Without padding any pointer serves: the kernels do not read from it.
            "mask": (spans if mask is None else mask.contiguous()).view(torch.uint8),
            "HAS_MASK": mask is not None, "CAUSAL": problem.causal,
            # Whether there is one matters, not how long it is.
            "window": None if problem.window is None else 1,
            "M": problem.rows, "T": self.length, "P": self.prefix_length, "C": self.documents,
        }  # fmt: skip

    @cached_property
    def tensors(self) -> dict[str, Tensor | None]:
        """What the lists are made of, by the names of the kernels' parameters."""
        return {name: self._arguments[name] for name in ("spans", "mask", "positions")}

    @staticmethod
    def of(problem: Problem) -> Plan:
        """The plan that the problem shares with the others of its reading."""
        sizes = (problem.total_length, problem.prefix_length, problem.rows, problem.causal)
        return problem.reading.keep(
            ("plan", *sizes, problem.window is None), problem.geometry,
            lambda: Plan(problem),
        )  # fmt: skip

    def documents_in_tiles(self, keys: int, slot: int) -> Documents:
        """The documents for tiles of so many keys, those of up to ``slot`` keys in packs."""
        if (keys, slot) not in self._lists:
            self._lists[keys, slot] = self._list_documents(keys, slot)
        return self._lists[keys, slot]

    def documents_in_any_tiles(self, keys: int, slot: int) -> Documents:
        """What was made for tiles of some size: the counts of rows and of the rest are equal."""
        return next(iter(self._lists.values()), None) or self.documents_in_tiles(keys, slot)

    @cached_property
    def order(self) -> Tensor:
        """``[B, C]`` int64: the documents by their starts."""
        return self._arguments["spans"][..., 0].argsort(dim=1, stable=True)

    @cached_property
    def rest(self) -> Tensor:
        """``[B, T]`` int32: written with the first list of documents."""
        return self._empty(self.batch * self.length)

    @cached_property
    def segment(self) -> Tensor:
        """``[B, T]`` int32: the document of each key, ``C`` outside all documents."""
        segment = self._empty(self.batch * self.length)
        self._list_keys(next(iter(self._lists.values())), segment=segment)
        return segment

    def weights(self, scores: Tensor, bias: bool) -> Tensor:
        """``[B, 1 or Hq, C]`` float32: what ``weights_kernel`` makes of the scores.

        Layers that share their scores share the weights.
        """
        key = contents(scores), bias
        if key not in self._weights:
            scores = scores.detach()
            weights = torch.empty(scores.shape, dtype=torch.float32, device=self.device)
            batch, heads, documents = scores.shape
            s_sb, s_sh, s_sc = scores.stride()
            own = {
                "scores": scores, "weights": weights, "s_sb": s_sb, "s_sh": s_sh, "s_sc": s_sc,
                "HS": heads, "BW": min(1024, max(16, bucket(documents))), "BIAS": bias,
            }  # fmt: skip
            run(weights_kernel, (heads * batch,), {**self._arguments, **own}, num_warps=4)
            self._weights[key] = scores, weights
        return self._weights[key][1]

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=self.device)

    def _list_documents(self, keys: int, slot: int) -> Documents:
        batch, documents = self.batch, self.documents
        # Every tile but a document's last is full, and one document, short or not, may be cut at
        # the prefix's end.
        limit = self.length // keys + min(documents, self.length // (slot + 1)) + 2
        sizes = (
            batch * limit * 4, batch * documents * 4, batch * COUNTS.value,
            batch * documents * PLACES.value,
        )  # fmt: skip
        # Each part begins at 16 bytes, whatever the sizes: a kernel is compiled for alignments.
        sizes = tuple(cdiv(size, 4) * 4 for size in sizes)  # type: ignore[assignment]
        tiles, shorts, counts, places = self._empty(sum(sizes)).split(sizes)
        made = Documents(tiles, shorts, counts, places, limit)
        own = {
            "order": self.order, "places": made.places, "shorts": made.shorts,
            "counts": made.counts, "BN": keys, "SLOT": slot,
            "BC": min(LISTED_DOCUMENTS, max(16, bucket(documents))),
        }  # fmt: skip
        run(list_documents_kernel, (batch,), {**self._arguments, **own}, num_warps=4)
        self._list_keys(made, tiles=keys, rest=not self._lists)
        return made

    def _list_keys(
        self, made: Documents, tiles: int = 0, rest: bool = False, segment: Tensor | None = None
    ) -> None:
        """Write the tiles of so many keys, the rest, and the segment, as asked for."""
        blocks = cdiv(self.length, LISTED_KEYS)
        if tiles:
            blocks = max(blocks, cdiv(made.limit, LISTED_TILES))
        own = {
            "order": self.order, "places": made.places, "tiles": made.tiles, "rest": self.rest,
            "segment": self.rest if segment is None else segment, "counts": made.counts,
            "NT": made.limit, "n_blocks": blocks, "BN": tiles or 16, "BX": LISTED_KEYS,
            "BT": LISTED_TILES, "TILES": tiles > 0, "REST": rest, "SEGMENT": segment is not None,
        }  # fmt: skip
        run(list_keys_kernel, (blocks * self.batch,), {**self._arguments, **own}, num_warps=4)
