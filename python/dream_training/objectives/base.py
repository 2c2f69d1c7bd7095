"""What the objectives have in common: a pool of candidate documents and the retriever's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class PoolObjective(nn.Module):
    """A sentence-transformers loss over the pool of documents that a batch brings along.

    The batch comes from :class:`~dream_training.collator.DreamCollator`. A subclass says what is
    read without a graph (:meth:`read`) and what the scores make of it (:meth:`loss`).

    Args:
        model: the retriever.
        temperature: divides the cosine similarities.

    Attributes:
        metrics: of the last batch, as floats: ``loss``, ``weight_on_positive`` (mean softmax
            weight of the known relevant documents; absent when none is known), ``entropy`` (of
            the weights, nats), ``max_entropy`` (of uniform weights), ``tokens`` (encoded).

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    name: str

    def __init__(self, model: SentenceTransformer, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = check_positive("temperature", temperature)
        self.metrics: dict[str, float] = {}

    def forward(
        self, sentence_features: list[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        query, pool = features_of(sentence_features, type(self).__name__)
        # Read before encoding: it needs no graph, so its peak memory comes first.
        evidence = self.read(query, pool)
        scores = self.scores(query, pool)
        loss = self.loss(scores, evidence, query, pool)
        self._record(loss, scores, query, pool)
        return loss

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Any:
        """Return what the objective needs of the texts, without gradient."""
        raise NotImplementedError

    def loss(
        self, scores: Tensor, evidence: Any, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        """Return the loss of scores ``[B, C]``; a document outside a query's pool has ``-inf``."""
        raise NotImplementedError

    def scores(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        """Cosine similarities over the temperature, ``[B, C]`` float32."""
        queries = self.model(model_inputs(query))["sentence_embedding"].float()
        documents = self.model(model_inputs(pool))["sentence_embedding"].float()
        normalize = nn.functional.normalize
        return normalize(queries, dim=-1) @ normalize(documents, dim=-1).T / self.temperature

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
        return {"objective": self.name, "temperature": self.temperature}


def weight_metrics(scores: Tensor, positives: Sequence[int]) -> dict[str, float]:
    """Entropy of the softmaxed scores ``[B, C]``, and their mean on the known positives."""
    weights = torch.softmax(scores, -1)
    metrics = {
        "entropy": torch.special.entr(weights).sum(-1).mean().item(),
        "max_entropy": math.log(scores.shape[1]),
    }
    known = [(row, place) for row, place in enumerate(positives) if place >= 0]
    if known:
        rows, places = zip(*known)
        metrics["weight_on_positive"] = weights[list(rows), list(places)].mean().item()
    return metrics


def features_of(
    sentence_features: list[dict[str, Any]], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the features of queries and pool, refusing a batch that brings no texts."""
    features = list(sentence_features)
    if len(features) != 2 or "texts" not in features[1] or "targets" not in features[0]:
        raise ValueError(
            f"{name} needs the texts beside the tokens: give the trainer "
            "data_collator=DreamCollator(model)"
        )
    return features[0], features[1]


def model_inputs(features: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch's features that the retriever takes."""
    return {k: v for k, v in features.items() if k not in ("texts", "targets", "positives")}


def check_positive(name: str, value: float) -> float:
    """Return ``value``, or raise ``ValueError`` naming the argument."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value``, or raise ``ValueError`` naming the argument."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
    return value
