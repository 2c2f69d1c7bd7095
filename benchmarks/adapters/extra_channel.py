"""The scores as extra channels of queries and keys (the idea of FlashBias)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from ..cases import Case, Inputs
from .base import Prepared, Refusal, expanded_keys, gradients_of, operator_leaves, wanted
from .sdpa import causal_arguments

_CHANNELS = 8  # two are used; kernels need head sizes that are multiples of 8


class ExtraChannel:
    """``[q, 1/scale, 1/scale, 0...] . [k, high(s), low(s), 0...]``: any fast kernel adds the score.

    The score is split into two channels, since one alone would round it to the dtype of the keys.
    """

    name = "sdpa, extra channel"

    def computes(self, case: Case) -> str:
        return "bias"

    def working_bytes(self, case: Case) -> int:
        return 10 * case.batch * case.query_heads * case.length * (case.head_dim + _CHANNELS) * 4

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        case = inputs.case
        if case.padding:
            return Refusal("a kernel that takes no mask takes no padding")
        leaves = operator_leaves(inputs, case.gradients)
        scale = case.head_dim**-0.5
        index = inputs.document_of_key()
        scored = inputs.scored_head()[:, None, None] & inputs.scored_row()[:, None]
        ones = torch.where(scored, 1.0 / scale, 0.0).to(inputs.query.dtype)  # [Hq, M, 1]
        ones = pad(ones.expand(case.batch, -1, -1, 2), (0, _CHANNELS - 2))
        causal, backends = causal_arguments(inputs)

        def forward() -> Tensor:
            key, value = expanded_keys(inputs, leaves)
            scores = pad(leaves["scores"], (0, 1))[:, index]  # [B, T]
            high = scores.to(key.dtype)
            # The gradient of the sum reaches the scores through the first channel alone.
            low = (scores - high.float()).detach().to(key.dtype)
            channels = pad(torch.stack([high, low], -1), (0, _CHANNELS - 2))
            channels = channels[:, None].expand(-1, case.query_heads, -1, -1)
            with sdpa_kernel(backends):
                output = scaled_dot_product_attention(
                    torch.cat([leaves["query"], ones], -1),
                    torch.cat([key, channels], -1),
                    pad(value, (0, _CHANNELS)),
                    scale=scale,
                    **causal,
                )
            return output[..., : case.head_dim]

        return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output))
