"""The operator as one would write it in a modelling file, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Case, Inputs
from .base import (
    DenseMask,
    Prepared,
    Refusal,
    expanded_keys,
    gradients_of,
    matrices,
    operator_leaves,
    wanted,
)


class Eager:
    """Matrix products in the case's dtype and a float32 softmax, as transformers' eager attention.

    It is also the yardstick of the others' rounding errors.
    """

    name = "eager"

    def computes(self, case: Case) -> str:
        return case.mode

    def working_bytes(self, case: Case) -> int:
        return matrices(case, 10)

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        case = inputs.case
        leaves = operator_leaves(inputs, case.gradients)
        dense_mask = DenseMask(inputs)
        # Without scores the mask is the causal one.
        causal = dense_mask(torch.zeros_like(inputs.scores), inputs.query.dtype)
        one_hot = torch.nn.functional.one_hot(dense_mask.index, case.documents + 1).float()

        def forward() -> Tensor:
            key, value = expanded_keys(inputs, leaves)
            logits = leaves["query"] @ key.transpose(-1, -2) * case.head_dim**-0.5
            if case.mode == "bias":
                weights = torch.softmax(
                    (logits + dense_mask(leaves["scores"], logits.dtype)).float(), -1
                )
            else:
                weights = torch.softmax((logits + causal).float(), -1)
                reweighted = reweight(weights, leaves["scores"], one_hot)
                weights = torch.where(dense_mask.scored, reweighted, weights)
            return weights.to(value.dtype) @ value

        return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output))


def reweight(weights: Tensor, scores: Tensor, one_hot: Tensor) -> Tensor:
    """Give every document the share of all documents' attention that its score says.

    Args:
        weights: ``[B, Hq, M, T]`` attention.
        scores: ``[B, C]``.
        one_hot: ``[T, C + 1]``, the document of each key, the last column for keys outside.
    """
    mass = weights @ one_hot  # [B, Hq, M, C + 1]
    shares = torch.softmax(scores, -1)[:, None, None, :]
    documents = mass[..., :-1]
    factors = shares * documents.sum(-1, keepdim=True) / documents.clamp(min=1e-30)
    return weights * (torch.nn.functional.pad(factors, (0, 1), value=1.0) @ one_hot.T)
