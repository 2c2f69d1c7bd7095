"""The interface of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..cases import Case, Inputs


@dataclass(frozen=True)
class Refusal:
    """Why a peer cannot compute a case."""

    reason: str


@dataclass
class Prepared:
    """A peer that is ready to run.

    Attributes:
        forward: computes the output ``[B, Hq, M, D]``.
        backward: computes the gradients of that output, by name; None where the peer has none.
        note: what a reader of the figures should know.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], dict[str, Tensor]] | None
    note: str = ""


class Adapter(Protocol):
    """One peer.

    Attributes:
        name: in tables and records.
    """

    name: str

    def computes(self, case: Case) -> str:
        """What it makes of the case: ``"reweight"``, ``"bias"`` or ``"plain"`` (no scores)."""

    def working_bytes(self, case: Case) -> int:
        """A rough estimate of what it allocates, to refuse what would exhaust the machine."""

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        """Prepare everything that is not part of the call itself."""


def matrices(case: Case, count: int, itemsize: int = 4) -> int:
    """Bytes of ``count`` matrices ``[B, Hq, M, T]``."""
    return count * case.batch * case.query_heads * case.rows * case.length * itemsize


def gradients_of(
    leaves: dict[str, Tensor], grad_output: Tensor
) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """A backward through autograd into ``leaves``, or None when there are none."""
    if not leaves:
        return None
    names, tensors = list(leaves), list(leaves.values())

    def backward(output: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, torch.autograd.grad(output, tensors, grad_output)))

    return backward


def operator_leaves(inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """Aliases of the case's query, local key, local value and scores; ``names`` get gradients.

    Aliases, because the peers of one case share its tensors and may not change each other's.
    """
    tensors = {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        "scores": inputs.scores,
    }
    return {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}


def wanted(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves that require gradients."""
    return {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}


def expanded_keys(inputs: Inputs, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hq, T, D]``, as peers without grouped heads and prefix need them."""
    groups = inputs.case.query_heads // inputs.case.key_heads
    key, value = inputs.joined(leaves["key"], leaves["value"])
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


class DenseMask:
    """Spreads scores over the keys: an additive mask ``[B, Hq, M, T]`` with their gradient."""

    def __init__(self, inputs: Inputs) -> None:
        self.index = inputs.document_of_key()
        self.visible = inputs.visible()
        self.scored = inputs.scored_head()[:, None, None] & inputs.scored_row()[:, None]

    def __call__(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        per_key = torch.nn.functional.pad(scores, (0, 1)).to(dtype)[:, self.index]
        mask = torch.where(self.scored, per_key[:, None, None, :], 0.0)
        return mask.masked_fill(~self.visible, -torch.inf)
