"""The doctor's trial: a short training on taught lines, evaluated on a small part."""

from __future__ import annotations

import io
import random
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_training.evaluation import RetrievalEvaluator, RetrievalTask, sample_queries
from dream_training.evaluation.paired import Comparison, compare_queries, describe_p
from dream_training.preflight.check import FAULT, OK, WARNING, Check

if TYPE_CHECKING:
    from dream_training.preflight.patient import Patient

_STEPS = 50
_QUERIES, _DOCUMENTS = 200, 1000
_SURE = 0.05
_ADVICE = (
    "it forgets more than it learns: lower trained_share or learning_rate, teach other lines, or "
    "keep the retriever as it is"
)


def trial(patient: Patient) -> Check:
    """Train for some steps of the run's own settings, and compare the retriever before and after.

    The learning rate falls to 0 within these steps, so that it is a small run and not the
    beginning of a large one.
    """
    from dream_training.models.loading import make_retriever
    from dream_training.training.driver import train
    from dream_training.training.inputs import make_evaluator

    config = patient.config
    evaluator = make_evaluator(config.evaluation, config.run.seed)
    assert evaluator is not None
    kept = _Kept(small_part(evaluator.task, config.run.seed))
    steps = min(config.optimisation.max_steps, _STEPS)
    with tempfile.TemporaryDirectory() as folder:
        train(
            config.with_changes(
                max_steps=steps,
                warmup_steps=min(config.optimisation.warmup_steps, steps // 10),
                eval_steps=steps,
                save_steps=0,
                final_tasks=None,
                report_queries=0,
                output_dir=folder,
            ),
            data=patient.data if patient.training_data is None else patient.training_data,
            # The doctor's own has been trained for two steps.
            model=make_retriever(config.retriever, config.lengths, config.run),
            evaluator=kept,
            console=Console(file=io.StringIO()),
        )
    before, after = kept.scores
    return of_trial(compare_queries(before, after), steps, len(kept.task.corpus))


def of_trial(found: Comparison, steps: int, documents: int) -> Check:
    """Judge nDCG@10 before and after a trial."""
    figure = (
        f"nDCG@10 {found.mean_a:.3f} before and {found.mean_b:.3f} after {steps} steps, over "
        f"{found.queries} queries and {documents:,} documents (p = {describe_p(found.p_value)})"
    )
    if found.difference >= 0:
        return Check("trial", OK, figure)
    return Check("trial", FAULT if found.p_value < _SURE else WARNING, figure, _ADVICE)


def small_part(task: RetrievalTask, seed: int) -> RetrievalTask:
    """Some queries of a task, over their relevant documents and others drawn by ``seed``."""
    task = sample_queries(task, _QUERIES, seed)
    relevant = {d for judged in task.qrels.values() for d, grade in judged.items() if grade > 0}
    others = sorted(task.corpus.keys() - relevant)
    random.Random(seed).shuffle(others)
    chosen = relevant.union(others[: max(0, _DOCUMENTS - len(relevant))])
    return replace(task, corpus={d: text for d, text in task.corpus.items() if d in chosen})


class _Kept(RetrievalEvaluator):
    """Keeps the scores of every evaluation."""

    def __init__(self, task: RetrievalTask) -> None:
        super().__init__(task)
        self.scores: list[dict[str, float]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        means = super().__call__(*args, **kwargs)
        self.scores.append({q: own["ndcg_at_10"] for q, own in self.query_scores.items()})
        return means
