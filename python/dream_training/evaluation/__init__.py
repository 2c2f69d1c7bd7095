"""nDCG@10 of retrievers on BEIR folders and mteb tasks, and paired tests between retrievers."""

from dream_training.evaluation.paired import Comparison, bootstrap_interval, compare_queries
from dream_training.evaluation.results import Evaluation, read_evaluations, write_evaluations
from dream_training.evaluation.retrieval import (
    TOP_K,
    Ranking,
    RetrievalEvaluator,
    RetrievalTask,
    average,
    sample_queries,
    score_queries,
    score_ranking,
    search,
    search_bm25,
)
from dream_training.evaluation.tasks import PRESETS, evaluate_task, expand_tasks

__all__ = [
    "PRESETS",
    "TOP_K",
    "Comparison",
    "Evaluation",
    "Ranking",
    "RetrievalEvaluator",
    "RetrievalTask",
    "average",
    "bootstrap_interval",
    "compare_queries",
    "evaluate_task",
    "expand_tasks",
    "read_evaluations",
    "sample_queries",
    "score_queries",
    "score_ranking",
    "search",
    "search_bm25",
    "write_evaluations",
]
