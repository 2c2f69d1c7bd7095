"""Batches for DREAM: the retriever's tokens, and the texts that the reader needs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUERY, DOCUMENT = "query", "document"
_COLUMNS = "query, target, and documents (a list of texts) or document / positive / negative..."


class DreamCollator:
    """Data collator for :class:`~dream_training.losses.DreamLoss`.

    A row has the columns ``query`` and ``target``, and its candidate documents either as a list,
    ``documents``, or as one column each (``document``, ``positive``, ``negative``, ``negative_2``,
    ...). All candidates of a batch form one pool without repetitions, which every query of the
    batch competes over.

    ``positive`` may also be an integer, the index of the known relevant document in ``documents``
    (-1 for unknown). It is only watched, never trained on.

    Args:
        model: the retriever; its tokenizer and prompts are used.
        query_max_len: tokens of a query that are encoded; the model's own limit by default.
        passage_max_len: tokens of a document that are encoded.
        prompts: prompt texts of ``"query"`` and ``"document"``; the model's own by default.
    """

    # read by SentenceTransformerTrainer
    valid_label_columns: Sequence[str] = ()
    prompts: dict[str, str] | None = None
    router_mapping: dict[str, str] | None = None

    def __init__(
        self,
        model: SentenceTransformer,
        query_max_len: int | None = None,
        passage_max_len: int | None = None,
        prompts: dict[str, str] | None = None,
    ) -> None:
        self.model = model
        self.max_len = {QUERY: query_max_len, DOCUMENT: passage_max_len}
        self._prompts = prompts if prompts is not None else (model.prompts or {})

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            return {}
        missing = {"query", "target"} - rows[0].keys()
        if missing:
            raise ValueError(
                f"DreamLoss needs the columns {_COLUMNS}; {', '.join(sorted(missing))} is missing "
                f"from {', '.join(rows[0])}"
            )
        pool: dict[str, int] = {}
        positives = []
        for row in rows:
            candidates, known = _candidates(row)
            places = [pool.setdefault(text, len(pool)) for text in candidates]
            positives.append(places[known] if known >= 0 else -1)
        queries = [row["query"] for row in rows]
        batch: dict[str, Any] = {}
        for name, texts in ((QUERY, queries), (DOCUMENT, list(pool))):
            for key, value in self._tokenize(name, texts).items():
                batch[f"{name}_{key}"] = value
            batch[f"{name}_texts"] = texts
        batch[f"{QUERY}_targets"] = [row["target"] for row in rows]
        batch[f"{QUERY}_positives"] = positives
        return batch

    def _tokenize(self, name: str, texts: list[str]) -> dict[str, Any]:
        limit, previous = self.max_len[name], self.model.max_seq_length
        prompt = self._prompts.get(name)
        try:
            if limit is not None:
                self.model.max_seq_length = limit
            return dict(self.model.preprocess(texts, prompt=prompt))
        finally:
            self.model.max_seq_length = previous


def _candidates(row: dict[str, Any]) -> tuple[list[str], int]:
    """Return the candidate texts of a row and the index of the known relevant one, or -1."""
    if "documents" in row:
        positive = row.get("positive", -1)
        return list(row["documents"]), -1 if positive is None else int(positive)
    columns = [
        name
        for name, value in row.items()
        if name not in ("query", "target") and isinstance(value, str)
    ]
    if not columns:
        raise ValueError(f"DreamLoss needs the columns {_COLUMNS}; got {', '.join(row)}")
    known = columns.index("positive") if "positive" in columns else -1
    return [row[name] for name in columns], known
