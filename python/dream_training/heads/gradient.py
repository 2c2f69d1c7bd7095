"""A criterion without labels: which heads lower the loss when they read what the loss prefers.

In training the scores move weight between documents in the chosen heads, and the reader's loss
responds. Here every head of every layer gets weights ``w`` over the documents, one set for each
query, and one backward pass gives the derivative of the loss ``L`` in every one of them. The
operator returns it in the logits, ``ds_d = w_d (dw_d - Σ_e w_e dw_e)`` for a head, so

    x[h, d] = ds[h, d] / w[h, d] = dL/dw[h, d] - a constant of the head.

The document that the loss itself prefers is ``d* = argmin_d Σ_h x[h, d]``, over all heads. When
the weight of head ``h`` moves from uniform to ``d*``, the loss drops, to first order, by

    score(h) = mean_d x[h, d] - x[h, d*],

summed over the tokens of the target. The criterion is this project's own.

Where to take the derivative: in training a few heads are scored and the others read as usual, so
the reader should stay close to itself. ``"own"`` gives every head its own mean weights, ``w_d =
m_d / Σ_e m_e`` with ``m_d`` the mean mass of document ``d`` over the rows of query and target; only
the differences between rows are lost. ``"uniform"`` weights in all heads at once are
farther away. With SmolLM2-135M on 48 questions of Natural Questions in pools of 16 the loss was
3.33 without scores, 3.86 at ``"own"`` and 4.43 at ``"uniform"``; 12 of the 16 heads chosen
were the same, and the loss preferred the document known to be relevant in 73% and 71% of the cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dream_training.choices import GRADIENT_POINTS, check_choice
from dream_training.reading.reader import Reader

# Below it, the quotient of a gradient and a weight of the same size would be meaningless.
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True)
class GradientScores:
    """What :func:`gradient_scores` returns.

    Attributes:
        drop: ``[B, layers, Hq]`` float32, first-order drop of the loss summed over the target's
            tokens, in nats.
        preferred: ``[B]`` int64, the document that the loss prefers.
        target_tokens: number of target tokens of all ``B`` queries.
        loss: mean loss over them where the derivative is taken, in nats.
    """

    drop: Tensor
    preferred: Tensor
    target_tokens: int
    loss: float


def gradient_scores(
    reader: Reader,
    queries: Sequence[str],
    targets: Sequence[str],
    documents: Sequence[str],
    point: str = "own",
) -> GradientScores:
    """Differentiate the loss in every head's weights over one pool of documents.

    One forward and backward pass in which every head receives scores that can, after one forward
    pass for the weights if ``point`` is ``"own"``. The reader's own heads are restored afterwards.

    Args:
        reader: the reader; its own heads do not matter here. In mode ``"bias"`` scores are added
            to attention logits, the derivative is taken in them at 0, where the reader is exactly
            itself, and ``point`` has no meaning.
        queries: ``B`` texts.
        targets: ``B`` texts.
        documents: ``C`` texts, one pool for all queries.
        point: where the derivative is taken, ``"own"`` or ``"uniform"``.

    Raises:
        ValueError: ``point`` is unknown.
    """
    check_choice("point", point, GRADIENT_POINTS)
    injection, config = reader.injection, reader.model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    prefix = reader.read(documents)
    ids, mask, rows = reader.suffix_rows(queries, targets)
    reached = injection.layers_that_reach(prefix.farthest() + ids.shape[1])
    shape = (len(queries), layers, heads, len(documents))
    weights = torch.ones(shape)
    if injection.mode == "reweight":
        if point == "own":
            weights = injection.read_mass(
                rows, input_ids=ids, attention_mask=mask, document_prefix=prefix
            ).transpose(0, 1)
        weights = (weights / weights.sum(-1, keepdim=True)).nan_to_num().clamp(min=_LEAST_WEIGHT)
        weights = weights / weights.sum(-1, keepdim=True)
    scores = weights.log().requires_grad_()
    own_heads = injection.heads
    try:
        injection.use_heads({layer: range(heads) for layer in reached})
        reading = reader(prefix, queries, targets, scores)
        (gradient,) = torch.autograd.grad(reading.loss * reading.target_tokens, scores)
    finally:
        injection.use_heads(own_heads)
    derivative = gradient / weights
    preferred = derivative.sum((1, 2)).argmin(-1)
    own = derivative[torch.arange(len(queries)), :, :, preferred]
    return GradientScores(
        derivative.mean(-1) - own, preferred, reading.target_tokens, reading.loss.item()
    )
