"""The reader's verdict on a pool: what each document would be worth, from one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels import Prefix

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader


@dataclass(frozen=True)
class Verdict:
    """What the reader says of the documents of each query.

    Attributes:
        logits: ``[B, C]`` float32 or wider, in nats, 0 at documents outside a query's pool.
        target_tokens: number of target tokens that were predicted.
    """

    logits: Tensor
    target_tokens: int


def judge(
    reader: Reader, prefix: Prefix, queries: Sequence[str], targets: Sequence[str]
) -> Verdict:
    r"""Read with the same weight on each document, and differentiate in the weights.

    With :math:`C` documents in the pool of query :math:`b` and :math:`L_b` its mean loss over
    :math:`T_b` target tokens,

    .. math:: u_d = -T_b \Big(\frac{\partial L_b}{\partial w_d} -
              \frac{1}{C} \sum_e \frac{\partial L_b}{\partial w_e}\Big)
              = -C\, T_b \frac{\partial L_b}{\partial s_d}

    is to first order how much more likely, in nats, the target becomes when document :math:`d`
    alone is read. One forward and one backward, whatever :math:`C` is.

    Args:
        reader: the frozen language model, with the heads that receive the weights.
        prefix: the documents, from ``reader.read``; one pool, or one for each query.
        queries: ``B`` texts.
        targets: ``B`` texts.

    Raises:
        ValueError: a text is blank, or does not fit into the reader's context.
    """
    starts, ends = prefix.spans.unbind(-1)
    documents = (ends > starts).sum(-1, keepdim=True)  # [1 or B, 1]
    shape = (len(queries), prefix.spans.shape[1])
    options: Any = {"device": reader.device, "dtype": reader.loss_dtype}
    equal = torch.zeros(shape, **options, requires_grad=True)
    with torch.enable_grad():
        reading = reader(prefix, queries, targets, equal)
        (gradient,) = torch.autograd.grad(reading.loss, equal)
    # The reader's loss is the mean over the target tokens of all queries.
    logits = -gradient * reading.target_tokens * documents
    return Verdict(logits, reading.target_tokens)
