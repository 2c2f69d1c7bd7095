"""PyTorch's FlexAttention, compiled, with the scores captured by ``score_mod``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import Case, Inputs
from .base import Prepared, Refusal, gradients_of, operator_leaves, wanted


class FlexAttention:
    """``score_mod`` adds ``scores[b, document_of_key[j]]``; its gradient uses float atomics."""

    name = "flex_attention"

    def computes(self, case: Case) -> str:
        return "bias"

    def working_bytes(self, case: Case) -> int:
        return 8 * case.batch * case.query_heads * case.length * case.head_dim * 4

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case = inputs.case
        cuda = inputs.device.type == "cuda"
        if case.head_dim < 16:
            return Refusal(f"needs a head size of at least 16, got {case.head_dim}")
        leaves = operator_leaves(inputs, case.gradients if cuda else ())
        index = inputs.document_of_key()
        scored_head, scored_row = inputs.scored_head(), inputs.scored_row()
        documents, offset = case.documents, case.length - case.rows
        scores = leaves["scores"]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            document = index[n]
            bias = scores[b, document.clamp(max=documents - 1)]
            use = (document < documents) & scored_head[h] & scored_row[m]
            return torch.where(use, score + bias.to(score.dtype), score)

        kept = inputs.padding_mask()

        def visible(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return n <= m + offset if kept is None else (n <= m + offset) & kept[n]

        block_mask = create_block_mask(
            visible, None, None, case.rows, case.length, device=str(inputs.device)
        )
        # A captured tensor is fixed at compilation: one compilation for each case.
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        # Below 128 rows it would choose a split-KV kernel that has no gradient.
        options = {"FORCE_USE_FLEX_ATTENTION": True} if cuda and case.gradients else None

        def forward() -> Tensor:
            key, value = inputs.joined(leaves["key"], leaves["value"])
            return compiled(
                leaves["query"], key, value, score_mod=score_mod, block_mask=block_mask,
                enable_gqa=True, kernel_options=options,
            )  # fmt: skip

        if not cuda:
            note = "PyTorch compiles the backward for GPUs only"
            return Prepared(forward, None, note)
        return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output))
