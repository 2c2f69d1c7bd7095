"""Revela: language modelling of a batch of texts that attend to each other by similarity."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels import Prefix
from dream_training.distributed.pool import SHARE
from dream_training.objectives.base import ReaderObjective, weight_metrics
from dream_training.reading.pool import read_pool
from dream_training.reading.prompts import ReaderPrompt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.objectives.temperature import Temperature
    from dream_training.reading.reader import Reader

# A text follows the others as they follow each other; there is no query.
TEXT_PROMPT = ReaderPrompt(query="\n\n{query}", target="{target}")


class RevelaLoss(ReaderObjective):
    r"""Revela, as far as its definition carries over to a frozen reader.

    Every document :math:`i` of the batch is itself the text to predict, and attends to the other
    ones :math:`j` in *all* layers and heads, inside each of them as the reader attends, and
    between them by the retriever's similarity:

    .. math:: L = -\frac{1}{T} \sum_i \sum_t \log p(x_{i,t} \mid x_{i,<t}, \{x_j\}_{j \ne i}),
              \qquad W_{ij} = \mathrm{softmax}_{j \ne i}(\cos(x_i, x_j) / \tau)

    Queries and targets of the data are not used, nor labels. What differs from the source: the
    reader is frozen; the other texts get the share :math:`\mu` of the attention that the reader
    itself gives them (the operator's mode ``reweight``) where the source adds their output to
    the text's own.

    Source: Cai et al. 2025 (arXiv 2506.16552).

    Args:
        model: the retriever; documents are encoded as documents on both sides.
        reader: the frozen language model, injected into all its heads, with the prompt
            :data:`TEXT_PROMPT` and targets as long as its documents.
        temperature: divides the cosine similarities; the source uses 1e-4.
        mini_batch_size: texts that the retriever embeds at once; None for the whole batch.
        gather_across_devices: with several processes, the documents of all of them attend to each
            other, and each process predicts its share.

    Raises:
        ValueError: an argument is out of range; in training, a batch has one document only.
    """

    name = "revela"

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature = 1e-4,
        *,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, reader, temperature, mini_batch_size, gather_across_devices)
        self._target_tokens = 0

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Prefix:
        if len(pool["texts"]) < 2:
            raise ValueError("objective 'revela' needs at least two documents in a batch")
        return without_own(read_pool(self.reader, pool), predicted_rows(pool))

    def scores(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        embeddings = self.embed(pool)
        return embeddings[list(predicted_rows(pool))] @ embeddings.T / self.temperature()

    def choices(self, scores: Tensor) -> int:
        return super().choices(scores) - 1  # a text does not attend to itself

    def loss(
        self, scores: Tensor, evidence: Prefix, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        texts = [pool["texts"][i] for i in predicted_rows(pool)]
        reading = self.reader(evidence, None, texts, scores)
        self._target_tokens = reading.target_tokens
        return reading.loss

    def terms(self, evidence: Prefix, query: dict[str, Any], pool: dict[str, Any]) -> int:
        # An empty share predicts one document of another process, which does not count.
        share = pool.get(SHARE)
        return 0 if share is not None and not share.rows else self._target_tokens

    @torch.no_grad()
    def _record(
        self, loss: Tensor, scores: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> None:
        rows = predicted_rows(pool)
        others = scores.clone()
        others[range(len(rows)), list(rows)] = -torch.inf
        self.metrics = {
            "loss": loss.item(),
            **weight_metrics(others, [-1] * len(scores)),
            "tokens": int(pool["attention_mask"].sum()),
        }


def predicted_rows(pool: dict[str, Any]) -> range:
    """The places of the documents that this process predicts, at least one."""
    share = pool.get(SHARE)
    return range(len(pool["texts"])) if share is None else share.rows or range(1)


def without_own(prefix: Prefix, rows: range | None = None) -> Prefix:
    """Hide from each row of a shared pool a document of its own; as padding it counts as absent.

    Args:
        prefix: of the pool.
        rows: the document of each row, by default all documents in order.
    """
    places = torch.arange(prefix.length, device=prefix.spans.device)
    begin, end = prefix.spans[0].unbind(-1)
    own = (begin[:, None] <= places) & (places < end[:, None])  # [C, P]
    if rows is not None:
        own = own[list(rows)]
    mask = ~own if prefix.mask is None else prefix.mask & ~own
    return replace(prefix, mask=mask)
