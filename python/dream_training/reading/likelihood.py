"""How well the reader predicts a target from each document alone: the teacher of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dream_kernels import Prefix

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader


@dataclass(frozen=True)
class TargetLikelihood:
    """Log-probabilities of target tokens, one document in the reader's context at a time.

    Attributes:
        log_probabilities: ``[B, C, T]`` float32 or wider, in nats, ``log p(y_t | y_<t, q, d_c)``; 0
            at the padding after a shorter target and for a document outside the query's pool.
        token_mask: ``[B, T]`` bool, true for the tokens of each target.
    """

    log_probabilities: Tensor
    token_mask: Tensor

    def mean(self) -> Tensor:
        """Mean log-probability of a target token, ``[B, C]``."""
        return self.log_probabilities.sum(-1) / self.token_mask.sum(-1, keepdim=True)


@torch.no_grad()
def target_likelihood(
    reader: Reader,
    documents: Sequence[str] | Prefix,
    queries: Sequence[str],
    targets: Sequence[str],
    pools: Sequence[Sequence[int]] | None = None,
) -> TargetLikelihood:
    """Read every document alone and predict every target after it, without gradient.

    Takes ``B * C`` readings of query and target, against ``B`` of the DREAM objective.

    Args:
        reader: the frozen language model; its injected heads do not matter here.
        documents: the texts of the pool, or a prefix with one of them in each row.
        queries: ``B`` texts.
        targets: ``B`` texts.
        pools: for each query the indices of its ``C`` documents; None for all of them.

    Raises:
        ValueError: a text is blank, or does not fit into the reader's context.
    """
    if isinstance(documents, Prefix):
        prefix = documents
    else:
        prefix = reader.read(documents, [[i] for i in range(len(documents))])
    if pools is None:
        pools = [range(prefix.batch)] * len(queries)
    query_ids = reader.tokens.queries_of(queries, targets)
    target_ids = reader.tokens.targets(targets)
    reader.check_context(prefix, query_ids, target_ids)
    counts = torch.tensor([len(target) for target in target_ids], device=reader.device)
    token_mask = torch.arange(int(counts.max()), device=reader.device) < counts[:, None]
    result = torch.zeros(
        len(queries),
        max(map(len, pools)),
        token_mask.shape[1],
        device=reader.device,
        dtype=reader.loss_dtype,
    )
    for document in range(prefix.batch):
        places = [
            (b, list(pool).index(document)) for b, pool in enumerate(pools) if document in pool
        ]
        alone = prefix.of_rows(torch.tensor([document]))
        passes = reader.passes(
            [query_ids[b] for b, _ in places], [target_ids[b] for b, _ in places]
        )
        for part in passes if places else ():
            rows = [places[i][0] for i in part]
            losses = reader.token_losses(
                alone, [query_ids[b] for b in rows], [target_ids[b] for b in rows], None
            )
            own = result.new_zeros(len(rows), token_mask.shape[1])
            own[token_mask[rows]] = -losses
            for i, values in zip(part, own):
                result[places[i]] = values
    reader.catch_up()
    return TargetLikelihood(result, token_mask)
