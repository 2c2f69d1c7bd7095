"""Contrastive learning with labels, over each query's own candidates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from dream_training.distributed.pool import mean_over_ranks
from dream_training.objectives.accumulation import StepMetrics
from dream_training.objectives.base import PoolObjective, TrainingObjective

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.objectives.temperature import Temperature


class PoolInfoNCELoss(PoolObjective):
    r"""InfoNCE over the same pool of documents that the other objectives see.

    .. math:: L = -\frac{1}{B} \sum_b \log
              \frac{e^{\cos(q_b, d_b^+) / \tau}}{\sum_{d} e^{\cos(q_b, d) / \tau}}

    :math:`d` runs over the query's pool. It is the loss of sentence-transformers'
    ``MultipleNegativesRankingLoss`` for a shared pool; with a pool for each query it has no
    in-batch negatives, which that class cannot do.

    Source: van den Oord et al. 2018 (arXiv 1807.03748).

    Args:
        model: the retriever.
        temperature: divides the cosine similarities, a number or a ``Temperature``.
        mini_batch_size: texts that the retriever embeds at once; None for the whole batch.
        gather_across_devices: with several processes, compete over the documents of all of them.

    Raises:
        ValueError: an argument is out of range; in training, a query has no known positive.
    """

    name = "infonce"

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float | Temperature = 0.05,
        *,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, temperature, mini_batch_size, gather_across_devices)

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        unknown = [text for text, place in zip(query["texts"], query["positives"]) if place < 0]
        if unknown:
            raise ValueError(
                "objective 'infonce' needs a known positive for every query, "
                f"{unknown[0]!r} has none"
            )
        return pool["input_ids"].new_tensor(query["positives"])

    def loss(
        self, scores: Tensor, evidence: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        return nn.functional.cross_entropy(scores, evidence.to(scores.device))


class _Recorded(TrainingObjective):
    """Keeps ``loss`` and ``tokens`` of the last step, of all processes, in ``metrics``."""

    metrics = {}  # noqa: RUF012 - replaced as a whole at every step
    reader = None
    scale: float
    _step: StepMetrics | None = None

    @property
    def temperature(self) -> float:  # type: ignore[override]
        return 1.0 / self.scale

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        features = list(sentence_features)
        loss = super().forward(features, labels)
        tokens = sum(int(part["attention_mask"].sum()) for part in features)
        # Batches are equally large everywhere.
        own, weights = {"loss": loss.item(), "tokens": float(tokens)}, {"loss": 1.0}
        if loss.requires_grad:
            self._step = self._step or StepMetrics()
            own, weights = self._step.add(own, weights)
        self.metrics = mean_over_ranks(own, weights, list(own))
        return loss


class InBatchInfoNCELoss(_Recorded, MultipleNegativesRankingLoss):
    """The library's loss, in which all candidates of a batch compete."""


class CachedInBatchInfoNCELoss(_Recorded, CachedMultipleNegativesRankingLoss):
    """The same in mini-batches."""
