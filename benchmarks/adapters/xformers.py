"""xformers' memory-efficient attention with a dense bias."""

from __future__ import annotations

import importlib
import importlib.util

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


class Xformers:
    """The scores, spread over the keys, as ``attn_bias``."""

    name = "xformers"

    def computes(self, case: Case) -> str:
        return "bias"

    def working_bytes(self, case: Case) -> int:
        return matrices(case, 8)

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        if importlib.util.find_spec("xformers") is None:
            return Refusal("xformers is not installed")
        if inputs.device.type != "cuda":
            return Refusal("its kernels run on GPUs only")
        attend = importlib.import_module("xformers.ops").memory_efficient_attention
        # With queries, keys and values all frozen it silently drops the bias' gradient.
        names = inputs.case.gradients
        leaves = operator_leaves(inputs, (*names, "query") if names else ())
        dense_mask = DenseMask(inputs)

        def forward() -> Tensor:
            key, value = expanded_keys(inputs, leaves)
            bias = dense_mask(leaves["scores"], key.dtype)
            by_position = (x.transpose(1, 2) for x in (leaves["query"], key, value))
            return attend(*by_position, attn_bias=bias).transpose(1, 2)

        return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output))
