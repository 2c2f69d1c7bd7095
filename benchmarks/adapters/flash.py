"""The flash-attn package, without scores: its bias knows ALiBi only, and has no gradient."""

from __future__ import annotations

import importlib
import importlib.util

from torch import Tensor

from ..cases import Case, Inputs
from .base import Prepared, Refusal, gradients_of


class FlashAttention:
    """Keys joined beforehand, outside the time; heads stay grouped."""

    name = "flash_attn, no scores"

    def computes(self, case: Case) -> str:
        return "plain"

    def working_bytes(self, case: Case) -> int:
        return 8 * case.batch * case.query_heads * case.length * case.head_dim * 4

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        if importlib.util.find_spec("flash_attn") is None:
            return Refusal("flash_attn is not installed")
        if inputs.device.type != "cuda":
            return Refusal("its kernels run on GPUs only")
        if inputs.case.dtype == "float32":
            return Refusal("it has no float32 kernel")
        attend = importlib.import_module("flash_attn").flash_attn_func
        key, value = inputs.joined(inputs.key, inputs.value)
        leaves = {
            name: tensor.detach().transpose(1, 2).contiguous().requires_grad_()
            for name, tensor in (
                ("query", inputs.query),
                ("all keys", key),
                ("all values", value),
            )
        }

        def forward() -> Tensor:
            # From 2.1 on its causal mask puts the last row at the last key, as ours does.
            return attend(*leaves.values(), causal=True).transpose(1, 2)

        backward = None
        if inputs.case.gradients:
            backward = gradients_of(leaves, inputs.grad_output)
        return Prepared(forward, backward)
