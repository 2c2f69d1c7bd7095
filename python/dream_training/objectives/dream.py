"""Objectives that train a retriever from a reader's next-token loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels import Prefix
from dream_training.objectives.base import ReaderObjective
from dream_training.objectives.temperature import Temperature
from dream_training.reading.pool import read_pool, tokens_read
from dream_training.reading.reader import Reader, Reading

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class PoolReading(ReaderObjective):
    """An objective whose reader predicts the targets from the pool, in its injected heads."""

    _read_tokens = 0

    def read_documents(self, query: dict[str, Any], pool: dict[str, Any]) -> Prefix:
        """Read the documents of the batch once, without gradient."""
        if query.get("pools") is not None:
            return self.reader.read(pool["texts"], query["pools"])
        return read_pool(self.reader, pool)

    def predict(
        self, prefix: Prefix, scores: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> Reading:
        """Predict the targets of the batch, its documents scored with ``[B, C]``."""
        reading = self.reader(prefix, query["texts"], query["targets"], scores)
        self.count_read(prefix, pool, reading.target_tokens)
        return reading

    def count_read(self, prefix: Prefix, pool: dict[str, Any], target_tokens: int) -> None:
        """Count what the reader has read of a batch, for the metric ``tokens``."""
        self._read_tokens = target_tokens + tokens_read(prefix, self.reader, pool)

    @torch.no_grad()
    def _record(
        self, loss: Tensor, scores: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> None:
        super()._record(loss, scores, query, pool)
        self.metrics["tokens"] += self._read_tokens

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {
            **self.temperature.describe(),
            "context": self.reader.context,
            "heads": {layer: list(h) for layer, h in self.reader.injection.heads.items()},
        }

    @property
    def citation(self) -> str:
        return (
            "@misc{tang2026dream, title={DREAM: Dense Retrieval Embeddings via Autoregressive "
            "Modeling}, author={Tang and Yang}, year={2026}, eprint={2606.24667}, "
            "archivePrefix={arXiv}}"
        )


class DreamLoss(PoolReading):
    r"""The DREAM objective as a sentence-transformers loss.

    The candidates' similarities to the query, over a temperature, decide how much attention the
    reader's chosen heads give to each candidate while it predicts the target:

    .. math:: L = -\frac{1}{T} \sum_t \log p(y_t \mid y_{<t}, q, \mathrm{documents};
              s_d = \cos(q, d) / \tau)

    There are no relevance labels. The gradient reaches the retriever through the scores :math:`s`
    alone (Tang & Yang 2026, arXiv 2606.24667).

    Use it in an ordinary ``SentenceTransformerTrainer`` together with
    :class:`~dream_training.objectives.collator.DreamCollator`, which brings the texts along::

        loss = DreamLoss(model, reader)
        SentenceTransformerTrainer(
            model, args, train_dataset=data, loss=loss, data_collator=DreamCollator(model)
        ).train()

    Args:
        model: the retriever.
        reader: the frozen language model.
        temperature: divides the cosine similarities: a number, or a
            :class:`~dream_training.objectives.temperature.Temperature` that changes over the run
            or is learned.
        mini_batch_size: texts that the retriever embeds at once, see
            :func:`~dream_training.objectives.embedding.embed`; it bounds memory, for one more
            forward pass, and changes no result but for rounding and, in a retriever with
            dropout, which masks are drawn. None keeps the activations of the whole batch.
        gather_across_devices: with several processes, let a query compete over the documents of
            all of them.

    Attributes:
        metrics: of the last batch, as floats: ``loss`` (nats per target token),
            ``weight_on_positive`` (mean softmax weight of the known relevant documents; absent
            when none is known), ``entropy`` (of the weights, nats), ``max_entropy`` (of uniform
            weights), ``tokens`` (read and encoded), ``temperature`` where it changes, and with a
            document store ``store_hits`` and ``store_misses``.

    Raises:
        ValueError: ``temperature`` is not positive, or ``mini_batch_size`` below 1.
    """

    name = "dream"

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature = 0.05,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, reader, temperature, mini_batch_size, gather_across_devices)
        self._target_tokens = 0

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Prefix:
        return self.read_documents(query, pool)

    def loss(
        self, scores: Tensor, evidence: Prefix, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        if query.get("pools") is not None:
            # The reader knows from the spans which documents are absent; what scores them is moot.
            scores = scores.masked_fill(scores.isneginf(), 0.0)
        reading = self.predict(evidence, scores, query, pool)
        self._target_tokens = reading.target_tokens
        return reading.loss

    def terms(self, evidence: Prefix, query: dict[str, Any], pool: dict[str, Any]) -> int:
        return self._target_tokens
