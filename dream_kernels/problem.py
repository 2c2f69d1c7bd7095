"""The validated form of one call: what every implementation receives and returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

MODES = ("reweight", "bias")


def readable(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory.

    Views may leave a negation, a conjugation or zeros to their readers, and the implementations
    read memory.
    """
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


Kept = TypeVar("Kept")


class Reading:
    """What calls on the same documents share, such as the order in which keys are visited.

    Made for one pass of a model, or for one call and its backward, and dropped with it: what is
    kept lives no longer. It is found again by the memory of the tensors that it was made from, if
    nothing was written to them since.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[Tensor | None, ...], Any]] = {}

    def keep(
        self, name: Hashable, tensors: tuple[Tensor | None, ...], make: Callable[[], Kept]
    ) -> Kept:
        """Return what ``make`` returned when it was first called for ``name`` and ``tensors``."""
        key = (name, *map(contents, tensors))
        found = self._kept.get(key)
        if found is None:
            # The tensors are kept too: their memory cannot become another's.
            found = self._kept[key] = tensors, make()
        return found[1]


def contents(tensor: Tensor | None) -> Hashable:
    """Equal for tensors of the same memory, and other after it was written to."""
    if tensor is None:
        return None
    # Those of inference mode count no changes.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype


@dataclass(eq=False)  # to make a frozen one takes a tenth of a short call
class Problem:
    """One call of the operator after validation. Not to be changed.

    Keys are in two segments that are never joined: the prefix (``P`` keys, possibly shared by
    the whole batch) and the local keys (``N``). Positions count over both, ``T = P + N``.

    Attributes:
        query: ``[B, Hq, M, D]``, any strides.
        key: ``[B, Hkv, N, D]``, any strides, dtype of ``query``.
        value: ``[B, Hkv, N, Dv]``, otherwise as ``key``.
        scores: ``[B, 1 or Hq, C]`` in float32, or float64 when ``query`` is float64.
        prefix_key: ``[1 or B, Hkv, P, D]``, or None when ``P == 0``.
        prefix_value: ``[1 or B, Hkv, P, Dv]``, or None.
        sinks: ``[Hq]`` in the dtype of ``scores``, or None: a logit without a value in the
            normaliser of every row of a head, part of what is outside the documents.
        spans: ``[B, C, 2]`` int64; absent documents, padding-only ones included, are ``(0, 0)``.
        mask: ``[B, T]`` bool, True for a token, or None when nothing is padding.
        positions: ``[B, T]`` int64, the positions from which ``window`` counts, or None for the
            places of the keys.
        heads: for each query head, whether it receives the scores.
        mode: ``"reweight"`` or ``"bias"``.
        document_mass: the fixed mass of all documents together, or None for the reader's own.
        scale: factor of ``q . k``.
        causal: whether row ``m`` sees only keys at positions up to ``T - M + m``.
        window: rows see only keys less than this many positions before their own; in scored rows
            this holds outside the documents. None for all keys.
        softcap: ``c`` in ``c * tanh(a / c)``, which replaces the logit ``a``; None for ``a``.
        reading: what the call shares with others.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    sinks: Tensor | None
    spans: Tensor
    mask: Tensor | None
    positions: Tensor | None
    heads: tuple[bool, ...]
    mode: str
    document_mass: float | None
    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    reading: Reading = field(default_factory=Reading, repr=False)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that have gradients, in the order of :class:`Gradients`."""
        return (
            self.query, self.key, self.value, self.scores, self.prefix_key, self.prefix_value,
            self.sinks,
        )  # fmt: skip

    @property
    def geometry(self) -> tuple[Tensor | None, ...]:
        """The tensors that say where documents, tokens and rows are; they follow the others."""
        return self.spans, self.mask, self.positions

    @property
    def options(self) -> dict[str, Any]:
        """The fields that are not tensors, by name and in order."""
        return {
            "heads": self.heads,
            "mode": self.mode,
            "document_mass": self.document_mass,
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
        }

    def with_equal_dims(self) -> Problem:
        """The same problem, the narrower of keys and values filled up with zeros.

        Its output is the same in the first ``value_dim`` elements, and 0 after them.
        """

        def fill(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.shape[3] == self.widest_dim:
                return tensor
            return torch.nn.functional.pad(tensor, (0, self.widest_dim - tensor.shape[3]))

        names = ("query", "key", "value", "prefix_key", "prefix_value")
        filled: dict[str, Any] = {name: fill(getattr(self, name)) for name in names}
        return replace(self, **filled)

    @property
    def empty(self) -> bool:
        """Whether there is no row: nothing is computed, and all gradients are 0."""
        return 0 in self.query.shape

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def rows(self) -> int:
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def widest_dim(self) -> int:
        return max(self.head_dim, self.value_dim)

    @property
    def output_shape(self) -> torch.Size:
        return torch.Size((*self.query.shape[:3], self.value_dim))

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix_key is None else self.prefix_key.shape[2]

    @property
    def total_length(self) -> int:
        return self.prefix_length + self.key.shape[2]

    @property
    def documents(self) -> int:
        return self.spans.shape[1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


class Needs(NamedTuple):
    """Which gradients the backward has to produce."""

    query: bool
    key: bool
    value: bool
    scores: bool
    prefix_key: bool
    prefix_value: bool
    sinks: bool


class Gradients(NamedTuple):
    """Gradients in the shapes of the problem's tensors; None where they were not asked for."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    scores: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    sinks: Tensor | None


class Implementation(Protocol):
    """One way to compute the operator. All of them agree; they differ in speed and reach."""

    name: str
    any_value_dim: bool
    """Whether it takes values of another width than keys; else it gets them equally wide."""

    def why_not(self, problem: Problem) -> str | None:
        """Return why this implementation cannot run ``problem``, or None when it can."""

    def forward(self, problem: Problem, needs: Needs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output ``[B, Hq, M, Dv]`` and what a backward with ``needs`` will use.

        The saved tensors alias neither the inputs nor the output.
        """

    def empty_saved(self, problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
        """Return uninitialised tensors like those that ``forward`` saves.

        Their shapes and dtypes follow from those of the problem, not from any tensor's content.
        """

    def backward(
        self,
        problem: Problem,
        output: Tensor,
        saved: tuple[Tensor, ...],
        grad_output: Tensor,
        needs: Needs,
    ) -> Gradients:
        """Return the gradients named by ``needs``."""

    def mass(self, problem: Problem) -> Tensor:
        """Return the plain attention mass of each document, ``[B, Hq, M, C]``.

        In the accumulation dtype; over the keys of the document that the row can see, whatever
        ``heads`` says.
        """
