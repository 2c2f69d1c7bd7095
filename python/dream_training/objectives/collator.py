"""Batches for DREAM: the retriever's tokens, and the texts that the reader needs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dream_training.objectives.pools import Candidates, build_pools, check_pool, choose_candidates
from dream_training.reading.text_tokens import cut_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUERY, DOCUMENT = "query", "document"
_COLUMNS = "query, target, and documents (a list of texts) or document / positive / negative..."


class DreamCollator:
    """Data collator for :class:`~dream_training.objectives.dream.DreamLoss`.

    A row has the columns ``query`` and ``target``, and its candidate documents either as a list,
    ``documents``, or as one column each (``document``, ``positive``, ``negative``, ``negative_2``,
    ...). Which of them a query competes over is ``pool``:

    - ``"both"``: all candidates of a batch form one pool without repetitions, for every query;
    - ``"in_batch"``: one document of every row forms that pool, the relevant one where it is known
      and the first one elsewhere;
    - ``"mined"``: every query has a pool of its own candidates.

    ``positive`` may also be an integer, the index of the known relevant document in ``documents``
    (-1 for unknown). It is only watched, never trained on.

    Args:
        model: the retriever; its tokenizer and prompts are used.
        query_max_len: tokens of a query that are encoded; the model's own limit by default.
        passage_max_len: tokens of a document that are encoded.
        prompts: prompt texts of ``"query"`` and ``"document"``; the model's own by default.
        pool: ``"both"``, ``"in_batch"`` or ``"mined"``.
        documents_per_query: how many candidates of a row are drawn for a batch, the relevant one
            always among them where it is known; None for all.
        seed: of the draw.

    Raises:
        ValueError: ``pool`` is unknown, or ``documents_per_query`` below 1 or without meaning.
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
        pool: str = "both",
        documents_per_query: int | None = None,
        seed: int = 0,
    ) -> None:
        check_pool(pool, documents_per_query)
        self.pool, self.documents_per_query, self.seed = pool, documents_per_query, seed
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
        queries = [row["query"] for row in rows]
        candidates = choose_candidates(
            queries, list(map(_candidates, rows)), self.pool, self.documents_per_query, self.seed
        )
        documents, pools, positives = build_pools(candidates, self.pool)
        batch: dict[str, Any] = {}
        for name, texts in ((QUERY, queries), (DOCUMENT, documents)):
            for key, value in self._tokenize(name, texts).items():
                batch[f"{name}_{key}"] = value
            batch[f"{name}_texts"] = texts
        batch[f"{QUERY}_targets"] = [row["target"] for row in rows]
        batch[f"{QUERY}_positives"] = positives
        if pools is not None:
            batch[f"{QUERY}_pools"] = pools
        return batch

    def _tokenize(self, name: str, texts: list[str]) -> dict[str, Any]:
        limit, previous = self.max_len[name], self.model.max_seq_length
        prompt = self._prompts.get(name)
        try:
            if limit is not None:
                self.model.max_seq_length = limit
            texts = [cut_text(text, self.model.max_seq_length) for text in texts]
            return dict(self.model.preprocess(texts, prompt=prompt))
        finally:
            self.model.max_seq_length = previous


def _candidates(row: dict[str, Any]) -> Candidates:
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
