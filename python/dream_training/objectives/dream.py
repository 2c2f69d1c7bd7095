"""Objectives that train a retriever from a reader's next-token loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_training.objectives.base import features_of, store_counts, weight_metrics
from dream_training.objectives.embedding import check_mini_batch_size, embed
from dream_training.objectives.pools import pool_scores
from dream_training.objectives.temperature import Temperature, as_temperature
from dream_training.reading.reader import Reader

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class DreamLoss(nn.Module):
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
            forward pass, and changes no result. None keeps the activations of the whole batch.

    Attributes:
        metrics: of the last batch, as floats: ``loss`` (nats per target token),
            ``weight_on_positive`` (mean softmax weight of the known relevant documents; absent
            when none is known), ``entropy`` (of the weights, nats), ``max_entropy`` (of uniform
            weights), ``tokens`` (read and encoded), ``temperature`` where it changes, and with a
            document store ``store_hits`` and ``store_misses``.

    Raises:
        ValueError: ``temperature`` is not positive, or ``mini_batch_size`` below 1.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature = 0.05,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_mini_batch_size(mini_batch_size)
        self.model = model
        self.reader = reader
        self.temperature = as_temperature(temperature)
        self.mini_batch_size = mini_batch_size
        self.metrics: dict[str, float] = {}

    def forward(
        self, sentence_features: list[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        query, pool = features_of(sentence_features, type(self).__name__)
        # Read before encoding: the prefix needs no graph, so its peak memory comes first.
        pools = query.get("pools")
        before = store_counts(self)
        prefix = self.reader.read(pool["texts"], pools)
        queries = embed(self.model, query, self.mini_batch_size).float()
        documents = embed(self.model, pool, self.mini_batch_size).float()
        similarity = nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(
            documents, dim=-1
        ).transpose(0, 1)
        scores, present = pool_scores(similarity / self.temperature(), pools)
        # The reader knows from the spans which documents are absent; what scores them is moot.
        given = scores if present is None else scores.masked_fill(~present, 0.0)
        reading = self.reader(prefix, query["texts"], query["targets"], given)
        tokens = reading.target_tokens + prefix.tokens
        tokens += sum(int(f["attention_mask"].sum()) for f in (query, pool))
        with torch.no_grad():
            weights = weight_metrics(scores, query["positives"])
        self.metrics = {"loss": reading.loss.item(), **weights, "tokens": tokens}
        if self.temperature.changes:
            self.metrics["temperature"] = self.temperature.value
        self.metrics |= {name: n - before[name] for name, n in store_counts(self).items()}
        return reading.loss

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
