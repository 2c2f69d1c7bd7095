"""What ranks the documents of a corpus when candidates are mined: BM25 or a retriever."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dream_training.data.mining import Rank
from dream_training.evaluation.retrieval import RetrievalTask, search, search_bm25

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def rank_bm25(
    queries: Mapping[str, str], corpus: Mapping[str, str], k: int
) -> Mapping[str, Mapping[str, float]]:
    """Rank by BM25."""
    return search_bm25(RetrievalTask(queries, corpus, {}, keep_identical_ids=True), k)


def dense_rank(
    model: str,
    query_max_len: int | None,
    passage_max_len: int | None,
    batch_size: int,
    device: str | None,
    trust_remote_code: bool = False,
) -> tuple[Rank, dict[str, Any]]:
    """Return what ranks by a sentence-transformers model, and its version, lengths and prompts.

    Args:
        model: a checkpoint's folder or a hub name.
        query_max_len: tokens of a query; the model's own limit by default.
        passage_max_len: tokens of a document; the same.
        batch_size: texts encoded at once.
        device: where to; None for sentence-transformers' choice.
        trust_remote_code: run code that comes with the model.
    """
    from dream_training.models.retriever import load_sentence_transformer
    from dream_training.models.texts import text_settings

    retriever = load_sentence_transformer(
        model, device=device, trust_remote_code=trust_remote_code, what="retriever"
    )

    version = importlib.metadata.version("sentence-transformers")
    settings = text_settings(retriever, query_max_len, passage_max_len)
    rank = rank_by(retriever, query_max_len, passage_max_len, batch_size)
    return rank, {"sentence-transformers": version, **settings}


def rank_by(
    retriever: SentenceTransformer,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
    batch_size: int = 32,
) -> Rank:
    """Return what ranks by a retriever; arguments as in :func:`dense_rank`."""

    def rank(
        queries: Mapping[str, str], corpus: Mapping[str, str], k: int
    ) -> Mapping[str, Mapping[str, float]]:
        return search(
            retriever,
            RetrievalTask(queries, corpus, {}, keep_identical_ids=True),
            query_max_len=query_max_len,
            passage_max_len=passage_max_len,
            batch_size=batch_size,
            k=k,
        )

    return rank
