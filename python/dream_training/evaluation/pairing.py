"""Two models' evaluations side by side: the tasks that both have, and whether settings agree."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dream_training.console import tracked
from dream_training.evaluation.paired import Comparison, compare_queries
from dream_training.evaluation.results import (
    BM25,
    UNTRAINED,
    Evaluation,
    compare_settings,
    is_same_task,
)


def choose_model(
    evaluations: Sequence[Evaluation],
    model: str | None,
    source: str | os.PathLike[str],
    option: str,
) -> list[Evaluation]:
    """Return the evaluations of one model; without a name the only trained one.

    Raises:
        ValueError: there is no such model, or several to choose from.
    """
    models = list(dict.fromkeys(e.model for e in evaluations))
    if model is None:
        candidates = [name for name in models if name not in (BM25, UNTRAINED)] or models
        if len(candidates) != 1:
            raise ValueError(
                f"{source}: holds {len(candidates)} models, name one with --{option}: "
                f"{', '.join(candidates)}"
            )
        model = candidates[0]
    chosen = [e for e in evaluations if e.model == model]
    if not chosen:
        raise ValueError(f"{source}: has no model {model!r}; its models are {', '.join(models)}")
    return chosen


def pair_tasks(
    first: Sequence[Evaluation], second: Sequence[Evaluation]
) -> list[tuple[Evaluation, Evaluation]]:
    """The evaluations of two models on every task that both have, whatever its path is called."""
    pairs = []
    for a in first:
        same = [b for b in second if is_same_task(a, b)]
        # Of several folders with the same data, the one with the same name.
        same.sort(key=lambda b: b.task != a.task)
        pairs += [(a, b) for b in same[:1]]
    return pairs


def check_settings(
    first: Sequence[Evaluation], second: Sequence[Evaluation], allow_different: bool = False
) -> list[str]:
    """Return a warning for each way in which the settings of shared tasks differ.

    Raises:
        ValueError: they differ, and that is not allowed.
    """
    warnings: dict[str, None] = {}
    for a, b in pair_tasks(first, second):
        found = compare_settings(a, b)
        if found.different:
            problem = f"task {a.task!r}: {found}"
            if not allow_different:
                raise ValueError(
                    f"{problem}; the figures can only be compared with --allow-different"
                )
            warnings[problem] = None
        if found.unknown:
            warnings[
                f"task {a.task!r}: {', '.join(found.unknown)} cannot be compared, because "
                "only one of the files has recorded them"
            ] = None
    return list(warnings)


def compare_evaluations(
    first: Sequence[Evaluation], second: Sequence[Evaluation], seed: int = 0
) -> dict[str, Comparison]:
    """Compare two models on every task that both have.

    Raises:
        ValueError: the queries of a task differ.
    """
    pairs = pair_tasks(first, second)
    shown = tracked(pairs, "resampling: tasks", len(pairs))
    return {a.task: _compare(a, b, seed) for a, b in shown}


def _compare(a: Evaluation, b: Evaluation, seed: int) -> Comparison:
    try:
        return compare_queries(a.query_ndcg_at_10, b.query_ndcg_at_10, seed)
    except ValueError as error:
        raise ValueError(f"task {a.task!r}: {error}") from None
