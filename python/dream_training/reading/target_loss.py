"""The next-token loss of chosen positions, without the vocabulary's logits of all of them at once.

A frozen head's logits in float32 are by far the largest tensor of a step with a prefix: 16 targets
of 32 tokens over 49,152 words take 100 MB, and as much again for their gradient. Here they live for
one chunk of positions; what is kept for the backward is the gradient in the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_kernels.injection.support import backbone_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of one chunk, 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22
_PROBE_TOKENS = 2


class _TargetLosses(torch.autograd.Function):
    """Losses ``[R]`` of hidden states ``[R, H]`` under a frozen head."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: nn.Module, targets: Tensor, rows: int) -> Tensor:
        differentiable = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for chunk, target in zip(states.split(rows), targets.split(rows)):
            with torch.set_grad_enabled(differentiable):
                leaf = chunk.detach().requires_grad_(differentiable)
                logits = at_least_float32(head(leaf))
                loss = nn.functional.cross_entropy(logits, target, reduction="none")
                if differentiable:
                    gradients += torch.autograd.grad(loss.sum(), leaf)
            losses.append(loss.detach())
        if differentiable:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return gradient * grad[:, None].to(gradient.dtype), None, None, None


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32, or in what they are if that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def target_losses(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of every row, in nats, float32 or wider.

    Args:
        head: the frozen language-model head; gets no gradient.
        states: ``[R, H]`` hidden states of the rows that predict.
        targets: ``[R]`` the tokens that they predict.
    """
    weight: Any = head.weight
    rows = max(1, _CHUNK_ELEMENTS // len(weight))
    return _TargetLosses.apply(states, head, targets, rows)


class _LossOfScores(torch.autograd.Function):
    """Runs the reader's backward in its forward, and keeps the gradient in the scores."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, run: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        differentiable = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(differentiable):
            own = scores.detach().requires_grad_(differentiable)
            loss, query_losses = run(own)
        if differentiable:
            ctx.save_for_backward(own.grad)
        ctx.mark_non_differentiable(query_losses)
        return loss, query_losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient), None


def loss_of_scores(
    scores: Tensor, run: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Run the reader forward and backward at once, so that one pass at a time is in memory.

    The reader is frozen and the prefix has no gradient: the loss depends on the scores alone, and
    its gradient in them is a small matrix, kept for the backward of what is returned.

    Args:
        scores: of the documents.
        run: takes a leaf with the values of ``scores``, returns the loss and the losses by query,
            and leaves the gradient of the loss in the leaf where it needs one.

    Returns:
        The loss, scalar, and the losses by query, which have no gradient.
    """
    return _LossOfScores.apply(scores, run)


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the head if the model's logits are exactly what it makes of the last hidden states.

    Some models scale or cap their logits after the head; for them, and for a head without a
    weight, the answer is None. Two tokens are run to find out.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        return None
    ids = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    states = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return head if torch.equal(logits, head(states)) else None
