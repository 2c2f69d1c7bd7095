"""``dream compare-runs``: is one retriever better than another, or was it luck with the queries?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dream_training.console import make_console, print_paths, show_on, shows_progress, tracked
from dream_training.evaluation.paired import Comparison, compare_queries, describe_p
from dream_training.evaluation.results import (
    BM25,
    UNTRAINED,
    Evaluation,
    compare_settings,
    is_same_task,
    read_evaluations,
)

# Of the figures of one task, in a line below its name.
_COLUMNS = "{:>8}  {:>6}  {:>10}  {:>18}  {:>7}  {:>16}"


@shows_progress
def run_compare(
    first: Path,
    second: Path,
    *,
    first_model: str | None,
    second_model: str | None,
    seed: int,
    allow_different: bool = False,
    console: Console | None = None,
) -> dict[str, Comparison]:
    """Run the command; the arguments are its own.

    Args:
        first: file of evaluations, or folder of a run.
        second: the other one.
        first_model: which model of the first.
        second_model: which model of the second.
        seed: of the resampling.
        allow_different: compare figures of other settings or data too, and say how they differ.
        console: where to print.

    Returns:
        A comparison by task, of the tasks that both files hold.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds several models and none was named, the two share no task, or the
            queries, settings or documents of a task differ.
    """
    console = show_on(console or make_console())
    a = choose_model(read_evaluations(first), first_model, first, "first-model")
    b = choose_model(read_evaluations(second), second_model, second, "second-model")
    warnings = check_settings(a, b, allow_different)
    comparisons = compare_evaluations(a, b, seed)
    if not comparisons:
        raise ValueError(
            f"no task is in both: {', '.join(e.task for e in a)} in {first}, "
            f"{', '.join(e.task for e in b)} in {second}"
        )
    print_paths(console, {"first": a[0].model, "second": b[0].model})
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow")
    heads = ("first", "second", "difference", "95 % interval", "p", "wins/ties/losses")
    console.print("\n" + _COLUMNS.format(*heads), soft_wrap=True, style="bold")
    for task, c in comparisons.items():
        console.print(task, soft_wrap=True)
        figures = _COLUMNS.format(
            f"{c.mean_a:.4f}", f"{c.mean_b:.4f}", f"{c.difference:+.4f}",
            f"{c.low:+.4f} .. {c.high:+.4f}", describe_p(c.p_value),
            f"{c.wins}/{c.ties}/{c.losses}",
        )  # fmt: skip
        console.print(figures, soft_wrap=True)
    console.print(
        "\nnDCG@10, second minus first, over the same queries: bootstrap interval of the mean and "
        "paired permutation test, 9,999 resamples each. The p values are not corrected for the "
        "number of tasks, and say nothing of other training seeds."
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
    """Return what is to be said of how the settings of shared tasks differ.

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
                f"task {a.task!r}: {', '.join(found.unknown)} cannot be compared, for only one "
                "of the files has recorded them"
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
