"""``dream compare-runs``: is one retriever better than another, or was it luck with the queries?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dream_training.evaluation.paired import Comparison, compare_queries
from dream_training.evaluation.results import Evaluation, read_evaluations
from dream_training.evaluation.tasks import BM25, UNTRAINED


def run_compare(
    first: Path,
    second: Path,
    *,
    first_model: str | None,
    second_model: str | None,
    seed: int,
    console: Console | None = None,
) -> dict[str, Comparison]:
    """Run the command; the arguments are its own.

    Returns:
        A comparison by task, of the tasks that both files hold.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds several models and none was named, the two share no task, or the
            queries of a task differ.
    """
    console = console or Console()
    a = choose_model(read_evaluations(first), first_model, first, "first-model")
    b = choose_model(read_evaluations(second), second_model, second, "second-model")
    comparisons = compare_evaluations(a, b, seed)
    if not comparisons:
        raise ValueError(
            f"no task is in both: {', '.join(e.task for e in a)} in {first}, "
            f"{', '.join(e.task for e in b)} in {second}"
        )
    console.print(f"first   {a[0].model}\nsecond  {b[0].model}", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("task", overflow="fold")
    for column in (
        "first", "second", "difference", "95 % interval", "p", "wins/ties/losses",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for task, c in comparisons.items():
        table.add_row(
            task, f"{c.mean_a:.4f}", f"{c.mean_b:.4f}", f"{c.difference:+.4f}",
            f"{c.low:+.4f} .. {c.high:+.4f}", describe_p(c.p_value),
            f"{c.wins}/{c.ties}/{c.losses}",
        )  # fmt: skip
    console.print(table, highlight=False)
    console.print(
        "nDCG@10, second minus first, over the same queries: bootstrap interval of the mean and "
        "paired permutation test, 9,999 resamples each. The p values are not corrected for the "
        "number of tasks, and say nothing of other training seeds.",
        highlight=False,
    )
    return comparisons


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


def compare_evaluations(
    first: Sequence[Evaluation], second: Sequence[Evaluation], seed: int = 0
) -> dict[str, Comparison]:
    """Compare two models on every task that both have.

    Raises:
        ValueError: the queries of a task differ.
    """
    others = {e.task: e for e in second}
    comparisons = {}
    for a in first:
        if a.task in others:
            try:
                comparisons[a.task] = compare_queries(
                    a.query_ndcg_at_10, others[a.task].query_ndcg_at_10, seed
                )
            except ValueError as error:
                raise ValueError(f"task {a.task!r}: {error}") from None
    return comparisons


def describe_p(value: float) -> str:
    """A p value as text; below what the resamples can tell it is only bounded."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
