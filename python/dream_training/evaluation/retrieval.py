"""nDCG@10 and recall@10 of a retriever, or of BM25, on queries with relevant documents."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from sentence_transformers.evaluation import SentenceEvaluator

from dream_training.console import progress
from dream_training.distributed import world
from dream_training.distributed.gather import gather_rows
from dream_training.distributed.pool import share_of
from dream_training.distributed.sharding import whole
from dream_training.models.texts import COSINE, DOCUMENT, QUERY, encode

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Ranking = dict[str, dict[str, float]]
TOP_K = 10


@dataclass(frozen=True)
class RetrievalTask:
    """What a retriever is evaluated on.

    Attributes:
        queries: text by query id.
        corpus: document text by id.
        qrels: relevance by query id and document id; every query has at least one.
        keep_identical_ids: rank a document also for the query that has the same id. In sets whose
            queries are documents (ArguAna, Quora) it is the query itself, which ``beir`` and
            ``mteb`` leave out.
    """

    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    keep_identical_ids: bool = False

    @cached_property
    def left_out(self) -> frozenset[str]:
        """Ids of the queries for which the document of the same id is not ranked.

        A document that the qrels call relevant is not the query itself, whatever its id.
        """
        if self.keep_identical_ids:
            return frozenset()
        both = self.queries.keys() & self.corpus.keys()
        return frozenset(q for q in both if self.qrels.get(q, {}).get(q, 0) <= 0)

    @property
    def searched(self) -> int:
        """Documents to retrieve in addition, so that enough remain."""
        return 1 if self.left_out else 0

    def without_itself(self, query: str, found: Mapping[str, float]) -> dict[str, float]:
        """The documents found for a query without the one that is left out."""
        if query not in self.left_out:
            return dict(found)
        return {document: score for document, score in found.items() if document != query}


def sample_queries(task: RetrievalTask, count: int | None, seed: int) -> RetrievalTask:
    """Return the task with ``count`` of its queries, drawn by ``seed``; the corpus stays whole.

    The same task, count and seed give the same queries. None, or more than there are, keeps all.
    """
    if count is None or count >= len(task.queries):
        return task
    chosen = set(random.Random(seed).sample(sorted(task.queries), count))
    return replace(
        task,
        queries={q: text for q, text in task.queries.items() if q in chosen},
        qrels={q: relevant for q, relevant in task.qrels.items() if q in chosen},
    )


def score_queries(
    task: RetrievalTask, ranking: Ranking, k: int = TOP_K
) -> dict[str, dict[str, float]]:
    """Return ``ndcg_at_k`` and ``recall_at_k`` of every query of the task.

    Computed by ``pytrec_eval``, as in ``beir``, but without rounding, and a query without results
    counts as 0, where ``beir`` leaves it out of the mean. Documents whose id equals the query's are
    dropped as :attr:`RetrievalTask.left_out` says.

    Raises:
        ValueError: the task has no query.
    """
    import pytrec_eval

    if not task.qrels:
        raise ValueError("the task has no query to average over")
    # pytrec_eval counts documents by grade in an array, and writes outside it for grades below -1.
    qrels = {
        q: {document: max(grade, 0) for document, grade in relevant.items()}
        for q, relevant in task.qrels.items()
    }
    # An id that is in no qrels, so that a query with an empty result list counts in the mean.
    results = {q: task.without_itself(q, ranking.get(q) or {}) or {"": 0.0} for q in qrels}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}", f"recall.{k}"})
    scores = evaluator.evaluate(results)
    return {
        q: {f"ndcg_at_{k}": scores[q][f"ndcg_cut_{k}"], f"recall_at_{k}": scores[q][f"recall_{k}"]}
        for q in qrels
    }


def score_ranking(task: RetrievalTask, ranking: Ranking, k: int = TOP_K) -> dict[str, float]:
    """Return ``ndcg_at_k`` and ``recall_at_k``, averaged over *all* queries of the task.

    Raises:
        ValueError: the task has no query.
    """
    return average(score_queries(task, ranking, k))


def average(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over the queries."""
    metrics = next(iter(scores.values()))
    # fsum: the mean must not depend on the order of the queries.
    return {
        name: math.fsum(values[name] for values in scores.values()) / len(scores)
        for name in metrics
    }


def search(
    model: SentenceTransformer,
    task: RetrievalTask,
    *,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
    batch_size: int = 32,
    devices: Sequence[str] | None = None,
    k: int = TOP_K,
    over_ranks: bool = False,
) -> Ranking:
    """Return the ``k`` nearest documents of every query by the model's similarity, mostly cosine.

    Best first, without those that :attr:`RetrievalTask.left_out` names.

    With ``over_ranks`` every process of a training encodes its share of queries and documents, and
    searches its documents for all queries; the results are merged and the same on every process.

    Args:
        model: the retriever.
        task: queries and corpus.
        query_max_len: tokens of a query that are encoded; the model's own limit by default.
        passage_max_len: tokens of a document that are encoded; likewise.
        batch_size: texts encoded at once.
        devices: encode the documents with one process for each of these devices, such as
            ``["cuda:0", "cuda:1"]`` or ``["cpu", "cpu"]``; None for this process alone.
        k: documents per query.
        over_ranks: share the work between the processes of a training; all of them call it, and
            ``devices`` is None.
    """
    from sentence_transformers.util import cos_sim, semantic_search

    documents, queries = list(task.corpus), list(task.queries)
    own, asked = range(len(documents)), range(len(queries))
    shared = over_ranks and world.size() > 1
    if shared:
        own, asked = share_of(len(documents)), share_of(len(queries))
        model = whole(model)
    home, cosine = model.device, model.similarity_fn_name == COSINE
    # The library would share the texts with the other processes, which do not call this.
    alone = str(home) if getattr(model, "_distributed_inference", None) else None
    options: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True}
    options |= {"show_progress_bar": False, "normalize_embeddings": cosine}
    with encoding(model, "documents", len(own), devices):
        corpus_embeddings = encode(
            model,
            [task.corpus[documents[i]] for i in own],
            DOCUMENT,
            passage_max_len,
            device=list(devices) if devices else alone,
            **options,
        )
    # Several processes leave the model, and its embeddings, on the CPU.
    model.to(home)
    corpus_embeddings = corpus_embeddings.to(home).float()
    # Queries are few and short: more processes would not pay off.
    with encoding(model, "queries", len(asked)):
        query_embeddings = encode(
            model,
            [task.queries[queries[i]] for i in asked],
            QUERY,
            query_max_len,
            device=alone,
            **options,
        ).float()
    if shared:
        # A process without queries does not know the width of the embeddings.
        width = world.max_over_ranks(query_embeddings.shape[-1])
        counts = [len(share_of(len(queries), process)) for process in range(world.size())]
        query_embeddings = gather_rows(query_embeddings.reshape(-1, width), counts)
    found: list[list[dict[str, Any]]] = [[] for _ in queries]
    wanted = k + task.searched
    if own:
        similarity = cos_sim if cosine else model.similarity
        with progress(f"searching {len(own):,} documents"):
            found = semantic_search(
                query_embeddings, corpus_embeddings, top_k=wanted, score_function=similarity
            )
    best = [[(float(hit["score"]), own[int(hit["corpus_id"])]) for hit in hits] for hits in found]
    if shared:
        best = _nearest_of_all(best, wanted)
    nearest = ({documents[i]: score for score, i in hits} for hits in best)
    return {q: _first(task.without_itself(q, found), k) for q, found in zip(queries, nearest)}


def _first(found: dict[str, float], k: int) -> dict[str, float]:
    """The first ``k`` documents of a ranking."""
    return dict(islice(found.items(), k))


@contextmanager
def encoding(
    model: SentenceTransformer,
    what: str,
    total: int | None = None,
    devices: Sequence[str] | None = None,
) -> Iterator[None]:
    """Show how many texts a model encodes in the block; other processes are not counted."""
    if devices:
        with progress(f"encoding {what} in {len(devices)} processes"):
            yield
        return
    with progress(f"encoding {what}", total) as work:

        def count(module: Any, inputs: Any, output: Any) -> None:
            work.advance(len(output["sentence_embedding"]))

        hook = model[-1].register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def _nearest_of_all(best: list[list[tuple[float, int]]], k: int) -> list[list[tuple[float, int]]]:
    """The ``k`` best hits of every query among those of all processes, best first."""
    parts = world.gather_json(best)
    joined = [[(score, i) for hits in of_query for score, i in hits] for of_query in zip(*parts)]
    return [sorted(hits, key=lambda hit: -hit[0])[:k] for hits in joined]


def search_bm25(task: RetrievalTask, k: int = TOP_K) -> Ranking:
    """Return the ``k`` best documents of every query by BM25 (``bm25s``, English stop words).

    As with :func:`search`, some may be left out.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs at debug level by default
    documents, queries = list(task.corpus), list(task.queries)
    index = bm25s.BM25()
    options: dict[str, Any] = {"stopwords": "en", "show_progress": False}
    with progress(f"BM25: indexing {len(documents):,} documents"):
        tokens = bm25s.tokenize([task.corpus[d] for d in documents], **options)
        index.index(tokens, show_progress=False)
    with progress(f"BM25: {len(queries):,} queries"):
        found, scores = index.retrieve(
            bm25s.tokenize([task.queries[q] for q in queries], **options),
            k=min(k + task.searched, len(documents)),
            show_progress=False,
        )
    ranking = {}
    for q, row, row_scores in zip(queries, found.tolist(), scores.tolist()):
        matching = {documents[i]: float(s) for i, s in zip(row, row_scores) if s > 0}
        ranking[q] = _first(task.without_itself(q, matching), k)
    return ranking


class RetrievalEvaluator(SentenceEvaluator):
    """A :class:`RetrievalTask` as a sentence-transformers evaluator.

    Args:
        task: queries, corpus and relevance.
        query_max_len: tokens of a query that are encoded; the model's own limit by default.
        passage_max_len: tokens of a document that are encoded; likewise.
        batch_size: texts encoded at once.
        devices: as in :func:`search`.

    Attributes:
        query_scores: result of :func:`score_queries` at the last call, empty before the first.
    """

    def __init__(
        self,
        task: RetrievalTask,
        query_max_len: int | None = None,
        passage_max_len: int | None = None,
        batch_size: int = 32,
        devices: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.query_max_len, self.passage_max_len = query_max_len, passage_max_len
        self.batch_size, self.devices = batch_size, devices
        self.query_scores: dict[str, dict[str, float]] = {}
        self.primary_metric = f"ndcg_at_{TOP_K}"

    def __call__(
        self,
        model: Any,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        self.query_scores = score_queries(self.task, self.rank(model))
        return average(self.query_scores)

    def rank(self, model: SentenceTransformer) -> Ranking:
        """Return the ranking that the scores are computed from."""
        return search(
            model,
            self.task,
            query_max_len=self.query_max_len,
            passage_max_len=self.passage_max_len,
            batch_size=self.batch_size,
            devices=self.devices,
            over_ranks=getattr(model, "_distributed_inference", None) is None,
        )
