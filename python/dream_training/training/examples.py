"""Some training queries before and after training: document weights, and the reader's attention."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_training.console import progress
from dream_training.models.texts import DOCUMENT, QUERY, encode
from dream_training.reading.reader import Reader

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DOCUMENTS_PER_QUERY = 2
_PAIRS = 64
_DIGITS = 6


class TrainingExamples:
    """A few fixed training queries over one small pool, and the embedding geometry of some more.

    The rows are drawn by the seed, not by their outcome. Their documents, at most two per row, form
    one pool, as in a batch.

    Args:
        data: rows with ``query``, ``target``, ``documents`` and ``positive``.
        count: how many queries.
        seed: of the choice.
    """

    def __init__(self, data: Iterable[Any], count: int, seed: int) -> None:
        rows = _draw(data, max(count, _PAIRS), seed)
        self.rows = rows[:count]
        pool: dict[str, int] = {}
        self.positives = []
        for row in self.rows:
            candidates, positive = list(row["documents"]), row.get("positive", -1)
            known = positive is not None and positive >= 0
            # The relevant one first, so that it is kept.
            order = sorted(range(len(candidates)), key=lambda i: i != positive)
            places = [
                pool.setdefault(candidates[i], len(pool)) for i in order[:_DOCUMENTS_PER_QUERY]
            ]
            self.positives.append(places[0] if known else -1)
        self.documents = list(pool)
        self.pairs = [
            (row["query"], row["documents"][row["positive"]])
            for row in rows[:_PAIRS]
            if (row.get("positive") if row.get("positive") is not None else -1) >= 0
        ]
        self.mass: Tensor | None = None
        self.measured: dict[str, dict[str, Any]] = {}
        self.geometry: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def measure(
        self, name: str, model: SentenceTransformer, reader: Reader | None, temperature: float
    ) -> None:
        """Measure the retriever as it is now, under ``name``: ``"before"`` or ``"after"``.

        Args:
            name: of the moment.
            model: the retriever.
            reader: gives the loss of every target and its own attention; None for objectives
                without a reader.
            temperature: divides the cosine similarities.
        """
        with progress(f"measuring the example queries {name} training"):
            self._measure(name, model, reader, temperature)

    def _measure(
        self, name: str, model: SentenceTransformer, reader: Reader | None, temperature: float
    ) -> None:
        texts = [row["query"] for row in self.rows]
        queries = _embed(model, texts, QUERY)
        documents = _embed(model, self.documents, DOCUMENT)
        scores = queries @ documents.T / temperature
        moment: dict[str, Any] = {"weights": torch.softmax(scores, -1), "losses": None}
        if reader is not None:
            prefix = reader.read(self.documents)
            targets = [row["target"] for row in self.rows]
            reading = reader(prefix, texts, targets, scores.to(reader.device))
            moment["losses"] = reading.query_losses.float().cpu()
            if self.mass is None:
                self.mass = _own_mass(reader, prefix, texts)
        self.measured[name] = moment
        if len(self.pairs) > 1:
            self.geometry[name] = geometry(
                _embed(model, [query for query, _ in self.pairs], QUERY),
                _embed(model, [document for _, document in self.pairs], DOCUMENT),
            )

    def state(self) -> dict[str, Any]:
        """Return what was measured so far, in a form that JSON can hold."""
        return {
            "mass": None if self.mass is None else self.mass.tolist(),
            "geometry": self.geometry,
            "measured": {
                name: {key: None if value is None else value.tolist() for key, value in own.items()}
                for name, own in self.measured.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.mass = None if state["mass"] is None else torch.tensor(state["mass"])
        self.geometry = state["geometry"]
        self.measured = {
            name: {
                key: None if value is None else torch.tensor(value) for key, value in own.items()
            }
            for name, own in state["measured"].items()
        }

    def content(self) -> dict[str, Any]:
        """Return what ``examples.json`` holds.

        ``documents`` are the texts of the pool; each of ``queries`` has its text, its ``target``,
        the index of its known relevant document (-1 if unknown), the reader's own attention mass by
        document and, by moment, the retriever's weight by document and the loss of the target in
        nats per token.
        """
        queries = []
        for b, row in enumerate(self.rows):
            moments = {
                name: {
                    "weights": _rounded(moment["weights"][b]),
                    "loss": None if moment["losses"] is None else _rounded(moment["losses"][b]),
                }
                for name, moment in self.measured.items()
            }
            queries.append(
                {
                    "query": row["query"],
                    "target": row["target"],
                    "positive": self.positives[b],
                    "mass": None if self.mass is None else _rounded(self.mass[b]),
                    **moments,
                }
            )
        return {
            "documents": self.documents,
            "queries": queries,
            "geometry": {"pairs": len(self.pairs), **self.geometry},
        }


def _embed(model: SentenceTransformer, texts: list[str], task: str) -> Tensor:
    """Unit embeddings ``[N, D]`` in float32 on the CPU."""
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    embeddings: Tensor = encode(model, texts, task, **options)
    return embeddings.float().cpu()


def geometry(queries: Tensor, documents: Tensor) -> dict[str, float]:
    """Return alignment and uniformity of unit embeddings (Wang & Isola, ICML 2020).

    ``alignment = mean ||q_i - d_i||^2``; ``uniformity = log mean_{i<j} exp(-2 ||x_i - x_j||^2)``.
    Lower is better for both.

    Args:
        queries: ``[N, D]``, N at least 2.
        documents: ``[N, D]``, each relevant to the query of its row.
    """
    return {
        "alignment": (queries - documents).square().sum(-1).mean().item(),
        "uniformity_queries": _uniformity(queries),
        "uniformity_documents": _uniformity(documents),
    }


def _uniformity(embeddings: Tensor) -> float:
    return torch.pdist(embeddings).square().mul(-2).exp().mean().log().item()


def _own_mass(reader: Reader, prefix: Any, queries: Sequence[str]) -> Tensor:
    """Attention mass of the query's tokens on each document without scores, ``[B, C]``.

    The mean over the heads that receive the scores.
    """
    ids, mask, weights = reader.query_rows(queries)
    mass = reader.injection.read_mass(
        weights, input_ids=ids, attention_mask=mask, document_prefix=prefix
    )
    chosen = [
        mass[layer, :, head] for layer, heads in reader.injection.heads.items() for head in heads
    ]
    return torch.stack(chosen).mean(0)


def _draw(data: Iterable[Any], count: int, seed: int) -> list[Any]:
    """Draw rows without reading the others; of a stream, take the first ones."""
    try:
        size = len(data)  # type: ignore[arg-type]
    except TypeError:
        return list(itertools.islice(data, count))
    chosen = random.Random(seed).sample(range(size), min(count, size))
    return [data[i] for i in chosen]  # type: ignore[index]


def _rounded(values: Tensor) -> Any:
    if values.dim() == 0:
        return round(values.item(), _DIGITS)
    return [round(value, _DIGITS) for value in values.tolist()]
