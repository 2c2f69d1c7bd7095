"""``scaled_dot_product_attention``: without scores, the floor, and with scores as a dense mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

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

_FORMS = {
    "expanded": "keys joined and expanded beforehand, outside the time",
    "grouped": "keys joined beforehand, enable_gqa",
    "joined": "keys joined and expanded inside the time, as a user has to",
}


def causal_arguments(inputs: Inputs) -> tuple[dict[str, Any], list[SDPBackend]]:
    """The causal mask in the form that lets SDPA's fastest kernel run, and the allowed kernels.

    Without padding: that would need a dense mask.
    """
    case = inputs.case
    cuda = inputs.device.type == "cuda"
    backends = (
        [SDPBackend.FLASH_ATTENTION] if cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    )
    if case.rows == case.length:
        return {"is_causal": True}, backends
    # On a GPU the flash kernel takes no mask but this one, which ends at the last key.
    mask = causal_lower_right(case.rows, case.length) if cuda else inputs.causal()
    return {"attn_mask": mask}, backends


class SdpaUnbiased:
    """Attention to the same keys without scores.

    Its gradients are those of queries, keys and values, whatever the case asks for: PyTorch's
    kernels compute the three together.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.name = f"sdpa, no scores, {form}"

    def computes(self, case: Case) -> str:
        return "plain"

    def working_bytes(self, case: Case) -> int:
        return 8 * case.batch * case.query_heads * case.length * case.head_dim * 4

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        leaves = operator_leaves(inputs, ("query", "key", "value"))
        del leaves["scores"]
        if self.form != "joined":
            key, value = inputs.joined(inputs.key, inputs.value)
            if self.form == "expanded":
                key, value = expanded_keys(inputs, {"key": inputs.key, "value": inputs.value})
            leaves = {
                "query": leaves["query"],
                "all keys": key.detach().requires_grad_(),
                "all values": value.detach().requires_grad_(),
            }
        causal, backends = causal_arguments(inputs)

        def forward() -> Tensor:
            if self.form == "joined":
                key, value = expanded_keys(inputs, leaves)
            else:
                key, value = leaves["all keys"], leaves["all values"]
            with sdpa_kernel(backends):
                return scaled_dot_product_attention(
                    leaves["query"], key, value, enable_gqa=self.form == "grouped", **causal
                )

        backward = gradients_of(leaves, inputs.grad_output) if inputs.case.gradients else None
        return Prepared(forward, backward, _FORMS[self.form])


class SdpaMask:
    """The scores, spread over the keys, as a dense additive mask ``[B, Hq, M, T]``."""

    name = "sdpa, dense mask"

    def computes(self, case: Case) -> str:
        return "bias"

    def working_bytes(self, case: Case) -> int:
        return matrices(case, 8)

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        names, backends, note = inputs.case.gradients, [SDPBackend.MATH], ""
        if inputs.device.type == "cuda":
            # The memory-efficient backward reads out of bounds when only the mask needs a gradient
            # (pytorch #148476), so the query gets one too.
            names = (*names, "query") if names else ()
            backends, note = [SDPBackend.EFFICIENT_ATTENTION], "memory-efficient kernel"
        leaves = operator_leaves(inputs, names)
        dense_mask = DenseMask(inputs)

        def forward() -> Tensor:
            key, value = expanded_keys(inputs, leaves)
            mask = dense_mask(leaves["scores"], key.dtype)
            with sdpa_kernel(backends):
                return scaled_dot_product_attention(leaves["query"], key, value, attn_mask=mask)

        return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output), note)
