"""``document_attention`` with each of its implementations."""

from __future__ import annotations

from torch import Tensor

from dream_kernels import document_attention, explain
from dream_kernels.dispatch import IMPLEMENTATIONS

from ..cases import Case, Inputs
from .base import Prepared, Refusal, gradients_of, matrices, operator_leaves, wanted


class Ours:
    """The operator as users call it, with the prefix read in place."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.name = f"ours ({impl})"

    def computes(self, case: Case) -> str:
        return case.mode

    def working_bytes(self, case: Case) -> int:
        if self.impl == "reference":
            return matrices(case, 10)
        return 16 * case.batch * case.query_heads * case.rows * (case.documents + 1)

    def setup(self, inputs: Inputs) -> Prepared | Refusal:
        case = inputs.case
        if self.impl not in IMPLEMENTATIONS:
            return Refusal("this build has no such implementation")
        leaves = operator_leaves(inputs, case.gradients)
        arguments = (*leaves.values(), inputs.spans)
        options = {
            "mode": case.mode, "heads": case.heads, "prefix": inputs.prefix,
            "attention_mask": inputs.attention_mask(),
        }  # fmt: skip
        reason = explain(*arguments, **options).reasons[self.impl]  # type: ignore[arg-type]
        if reason.startswith("cannot"):
            return Refusal(reason.removeprefix("cannot: "))

        def forward() -> Tensor:
            return document_attention(*arguments, **options, impl=self.impl)  # type: ignore[arg-type]

        return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output))
