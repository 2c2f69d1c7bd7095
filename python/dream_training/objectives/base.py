"""What the objectives have in common: a pool of candidate documents and the retriever's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_training.choices import check_at_least
from dream_training.distributed import world
from dream_training.distributed.pool import SHARE, gather_pool, mean_over_ranks
from dream_training.objectives.accumulation import Accumulation, StepMetrics
from dream_training.objectives.embedding import embed
from dream_training.objectives.pools import pool_scores
from dream_training.objectives.temperature import Temperature, as_temperature
from dream_training.objectives.watch import TrainingWatch
from dream_training.reading.target_loss import at_least_float32

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.objectives.verdicts import Verdicts
    from dream_training.reading.document_store import DocumentStore
    from dream_training.reading.reader import Reader

# What a batch may have in some process, so that all processes average the same metrics.
_METRICS = (
    *("loss", "entropy", "max_entropy", "weight_on_positive"),
    *("tokens", "store_hits", "store_misses"),
)


class TrainingObjective(nn.Module):
    """What a run needs of its objective, beside the loss that ``forward`` returns.

    Attributes:
        metrics: of the last step, as floats.
        reader: the frozen language model; None in an objective that reads nothing.
        temperature: divides the cosine similarities; a number where it cannot change.
        verdicts: what the reader said, where it is kept.
    """

    metrics: dict[str, float]
    reader: Reader | None
    temperature: Temperature | float
    verdicts: Verdicts | None = None

    @property
    def store(self) -> DocumentStore | None:
        """Where the reader keeps the documents that it has read; None if nowhere."""
        return None if self.reader is None else self.reader.store


class PoolObjective(TrainingObjective):
    """A sentence-transformers loss over the pool of documents of a batch.

    The batch comes from :class:`~dream_training.objectives.collator.DreamCollator`. A subclass says
    what is read without a graph (:meth:`read`) and what the scores make of it (:meth:`loss`).

    In several processes the loss is weighted so that its mean over them is the mean over the
    target tokens, or queries, of all of them; the metrics are those of all of them together. The
    batches of a step (``gradient_accumulation_steps``) are weighted alike, in their gradients: see
    :class:`~dream_training.objectives.accumulation.Accumulation`.

    Args:
        model: the retriever.
        temperature: divides the cosine similarities, a number or a
            :class:`~dream_training.objectives.temperature.Temperature`.
        mini_batch_size: texts that the retriever embeds at once, see
            :func:`~dream_training.objectives.embedding.embed`; None for the whole batch.
        gather_across_devices: let the queries of all processes compete over the documents of all
            of them.

    Attributes:
        metrics: of the last step, as floats: ``loss``, ``weight_on_positive`` (mean softmax
            weight of the known relevant documents; absent when none is known), ``entropy`` (of
            the weights, nats), ``max_entropy`` (of uniform weights), ``tokens`` (encoded), and
            ``temperature`` where it changes, and with a document store ``store_hits`` and
            ``store_misses``.

    Raises:
        ValueError: ``temperature`` is not positive, or ``mini_batch_size`` below 1.
    """

    name: str
    temperature: Temperature

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float | Temperature,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        self.gather_across_devices = gather_across_devices
        check_at_least("mini_batch_size", mini_batch_size, 1)
        self.mini_batch_size = mini_batch_size
        self.model = model
        self.reader = None
        self.temperature = as_temperature(temperature)
        self.metrics: dict[str, float] = {}
        self._accumulation, self._step = Accumulation(self), StepMetrics()
        self._watch = TrainingWatch()

    def forward(
        self, sentence_features: list[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        query, pool = features_of(sentence_features, type(self).__name__)
        if self.gather_across_devices:
            query, pool = gather_pool(query, pool)
        before = self._store_counts()
        # Read before encoding: it needs no graph, so its peak memory comes first.
        evidence = self.read(query, pool)
        scores = self.scores(query, pool)
        loss = self.loss(scores, evidence, query, pool)
        self._record(loss, scores, query, pool)
        terms = self.terms(evidence, query, pool)
        if self.temperature.changes:
            self.metrics["temperature"] = self.temperature.value
        self.metrics |= {name: n - before[name] for name, n in self._store_counts().items()}
        if loss.requires_grad:
            self._watch(self, lambda: self.choices(scores))
        loss, terms = self._weighted(loss, terms, len(scores) if terms else 0, query["positives"])
        return self._accumulation.weighted(loss, terms)

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Any:
        """Return what the objective needs of the texts, without gradient."""
        raise NotImplementedError

    def loss(
        self, scores: Tensor, evidence: Any, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        """Return the loss of scores ``[B, C]``; a document outside a query's pool has ``-inf``."""
        raise NotImplementedError

    def terms(self, evidence: Any, query: dict[str, Any], pool: dict[str, Any]) -> int:
        """Of how many things the loss is the mean: queries, unless a subclass says otherwise."""
        return len(query["texts"])

    def choices(self, scores: Tensor) -> int:
        """The most documents that a query of scores ``[B, C]`` can give its weight to."""
        return int(scores.isfinite().sum(-1).max())

    def scores(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        """Cosine similarities over the temperature, ``[B, C]`` float32."""
        similarity = self.embed(query) @ self.embed(pool).T
        return pool_scores(similarity / self.temperature(), query.get("pools"))[0]

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Embeddings of length 1, ``[N, D]`` float32 or wider, those of a pool of all its texts."""
        embeddings = at_least_float32(embed(self.model, features, self.mini_batch_size))
        embeddings = nn.functional.normalize(embeddings, dim=-1)
        return embeddings if SHARE not in features else features[SHARE].gather(embeddings)

    def _weighted(
        self, loss: Tensor, terms: int, rows: int, positives: Sequence[int]
    ) -> tuple[Tensor, int]:
        """Make metrics those of the step, and loss and terms those of all processes."""
        weights: dict[str, float] = {
            "loss": terms,
            "entropy": rows,
            "max_entropy": rows,
            "weight_on_positive": sum(place >= 0 for place in positives),
        }
        own = {name: self.metrics.pop(name) for name in _METRICS if name in self.metrics}
        if loss.requires_grad:
            own, weights = self._step.add(own, weights)
        if world.size() == 1:
            self.metrics |= own
            return loss, terms
        own["terms"] = terms
        metrics = mean_over_ranks(own, weights, [*_METRICS, "terms"])
        total = metrics.pop("terms")
        self.metrics |= metrics
        return loss * (terms * world.size() / total), int(total)

    def _store_counts(self) -> dict[str, int]:
        """Documents that the store had, and had not, so far."""
        store = self.store
        return {} if store is None else {"store_hits": store.hits, "store_misses": store.misses}

    @torch.no_grad()
    def _record(
        self, loss: Tensor, scores: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> None:
        self.metrics = {
            "loss": loss.item(),
            **weight_metrics(scores, query["positives"]),
            "tokens": sum(int(f["attention_mask"].sum()) for f in (query, pool)),
        }

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {"objective": self.name, **self.temperature.describe()}


class ReaderObjective(PoolObjective):
    """An objective that a frozen language model reads for; the other arguments as there.

    Args:
        reader: the frozen language model.
    """

    reader: Reader

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, temperature, mini_batch_size, gather_across_devices)
        self.reader = reader


def weight_metrics(scores: Tensor, positives: Sequence[int]) -> dict[str, float]:
    """Entropy of the softmaxed scores ``[B, C]``, and their mean on the known positives.

    A score of ``-inf`` says that the document is not in the query's pool.
    """
    weights = torch.softmax(scores, -1)
    metrics = {
        "entropy": torch.special.entr(weights).sum(-1).mean().item(),
        "max_entropy": scores.isfinite().sum(-1).log().mean().item(),
    }
    known = [(row, place) for row, place in enumerate(positives) if place >= 0]
    if known:
        rows, places = zip(*known)
        metrics["weight_on_positive"] = weights[list(rows), list(places)].mean().item()
    return metrics


def features_of(
    sentence_features: list[dict[str, Any]], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the features of queries and pool, refusing a batch without texts."""
    features = list(sentence_features)
    if len(features) != 2 or "texts" not in features[1] or "targets" not in features[0]:
        raise ValueError(
            f"{name} needs the texts beside the tokens: give the trainer "
            "data_collator=DreamCollator(model)"
        )
    return features[0], features[1]
