"""Scores against hand-computed ones, with beir's known defects guarded."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from sentence_transformers.evaluation import SentenceEvaluator

from dream_training.evaluation import (
    RetrievalEvaluator,
    RetrievalTask,
    sample_queries,
    score_queries,
    score_ranking,
    search,
    search_bm25,
)
from dream_training.models.retriever import build_retriever

pytestmark = pytest.mark.long

CORPUS = {"a": "red apples and pears", "b": "blue rivers", "c": "green stones", "q1": "grey clouds"}
TASK = RetrievalTask(
    {"q1": "apples", "q2": "rivers or stones"}, CORPUS, {"q1": {"a": 1}, "q2": {"b": 1, "c": 1}}
)


def test_scores_are_those_of_the_definition() -> None:
    ranking = {"q1": {"b": 3.0, "a": 2.0}, "q2": {"c": 3.0, "a": 2.0, "q1": 1.0, "b": 0.5}}
    scores = score_ranking(TASK, ranking)
    ideal = 1 + 1 / math.log2(3)
    expected = (1 / math.log2(3) + (1 + 1 / math.log2(5)) / ideal) / 2
    assert scores["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)
    assert scores["recall_at_10"] == pytest.approx(1.0)


def test_scores_are_those_of_beir_where_beir_has_no_defect() -> None:
    from beir.retrieval.evaluation import EvaluateRetrieval

    rng = random.Random(3)
    documents = [f"d{i}" for i in range(40)]
    qrels = {f"q{i}": {d: rng.randint(0, 2) for d in rng.sample(documents, 5)} for i in range(8)}
    ranking = {q: {d: rng.random() for d in rng.sample(documents, 20)} for q in qrels}
    task = RetrievalTask(dict.fromkeys(qrels, "?"), dict.fromkeys(documents, "."), qrels)
    ndcg, _, recall, _ = EvaluateRetrieval.evaluate(qrels, ranking, [10])
    scores = score_ranking(task, ranking)
    assert scores["ndcg_at_10"] == pytest.approx(ndcg["NDCG@10"], abs=6e-6)
    assert scores["recall_at_10"] == pytest.approx(recall["Recall@10"], abs=6e-6)
    by_query = score_queries(task, ranking)
    assert by_query.keys() == qrels.keys()
    mean = sum(values["ndcg_at_10"] for values in by_query.values()) / len(by_query)
    assert mean == pytest.approx(scores["ndcg_at_10"], abs=1e-12)


def test_a_query_without_results_counts_as_zero() -> None:
    full = score_ranking(TASK, {"q1": {"a": 1.0}, "q2": {"b": 2.0, "c": 1.0}})
    half = score_ranking(TASK, {"q1": {"a": 1.0}})
    empty = score_ranking(TASK, {"q1": {"a": 1.0}, "q2": {}})
    assert full["ndcg_at_10"] == 1.0
    assert half["ndcg_at_10"] == empty["ndcg_at_10"] == 0.5


def test_one_query_is_enough_and_what_is_relevant_is_not_the_query_itself() -> None:
    task = RetrievalTask({"q1": "clouds"}, CORPUS, {"q1": {"q1": 1}})
    assert score_ranking(task, {"q1": {"q1": 1.0}}) == {"ndcg_at_10": 1.0, "recall_at_10": 1.0}


# A query that is a document: it finds itself first, and its duplicate next.
DUPLICATES = RetrievalTask(
    {"q": "red apples"}, {"q": "red apples", "d": "red apples again"}, {"q": {"d": 1}}
)


def test_a_query_that_is_a_document_does_not_find_itself(tiny_model) -> None:
    from beir.retrieval.evaluation import EvaluateRetrieval

    model = build_retriever(tiny_model, device="cpu", max_len=64)
    kept = replace(DUPLICATES, keep_identical_ids=True)
    for find in (search_bm25, lambda task, **options: search(model, task, **options)):
        with_itself = find(kept)
        assert list(with_itself["q"]) == ["q", "d"]
        assert score_ranking(kept, with_itself)["ndcg_at_10"] == pytest.approx(0.631, abs=1e-3)
        ranking = find(DUPLICATES)
        assert list(ranking["q"]) == ["d"]
        assert score_ranking(DUPLICATES, ranking) == score_ranking(DUPLICATES, with_itself)
        # beir drops from the ranking that it is given, in place.
        ndcg, *_ = EvaluateRetrieval.evaluate(DUPLICATES.qrels, with_itself, [10])
        assert score_ranking(DUPLICATES, ranking)["ndcg_at_10"] == ndcg["NDCG@10"] == 1.0
        assert list(find(DUPLICATES, k=1)["q"]) == ["d"], "as many are found as are wanted"
    assert RetrievalEvaluator(DUPLICATES)(model)["ndcg_at_10"] == 1.0
    assert sample_queries(kept, 1, 0).keep_identical_ids


def test_bm25_finds_shared_words() -> None:
    ranking = search_bm25(TASK)
    assert max(ranking["q1"], key=ranking["q1"].get) == "a"
    assert set(ranking["q2"]) == {"b", "c"}
    assert score_ranking(TASK, ranking)["ndcg_at_10"] == 1.0


def test_the_evaluator_ranks_every_query(tiny_model) -> None:
    model = build_retriever(tiny_model, layers=1, device="cpu", max_len=64)
    evaluator = RetrievalEvaluator(TASK, query_max_len=8, passage_max_len=16)
    assert isinstance(evaluator, SentenceEvaluator)
    ranking = evaluator.rank(model)
    assert {q: len(found) for q, found in ranking.items()} == {"q1": 3, "q2": 4}
    assert evaluator(model) == score_ranking(TASK, ranking)
    assert model.max_seq_length == 64


def test_a_sample_of_queries_is_seeded_and_keeps_the_corpus() -> None:
    queries = {f"q{i}": f"query {i}" for i in range(20)}
    task = RetrievalTask(queries, CORPUS, {q: {"a": 1} for q in queries})
    sample = sample_queries(task, 5, seed=1)
    assert len(sample.queries) == 5 and sample.qrels.keys() == sample.queries.keys()
    assert sample.corpus is task.corpus
    assert sample_queries(task, 5, seed=1).queries == sample.queries
    assert sample_queries(task, 5, seed=2).queries != sample.queries
    assert sample_queries(task, None, 0) is sample_queries(task, 20, 0) is task


def test_two_processes_rank_like_one(tiny_model) -> None:
    """The lengths too: a process has a copy of the model, made when the process starts."""
    model = build_retriever(tiny_model, layers=1, device="cpu", max_len=64)
    options = {"query_max_len": 6, "passage_max_len": 9}
    one = search(model, TASK, **options)
    two = search(model, TASK, **options, devices=["cpu", "cpu"])
    assert one.keys() == two.keys()
    for query, found in one.items():
        assert list(found) == list(two[query])
        assert two[query] == pytest.approx(found, abs=1e-5)
    assert model.max_seq_length == 64
