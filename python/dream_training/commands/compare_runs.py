"""``dream compare-runs``: is one retriever better than another, or was it chance?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dream_training.console import (
    loading_libraries,
    make_console,
    print_paths,
    show_on,
    shows_progress,
)

# Of the figures of one task, in a line below its name.
_COLUMNS = "{:>8}  {:>6}  {:>10}  {:>18}  {:>7}  {:>16}"


@shows_progress
def compare_runs(
    first: Annotated[
        Path, typer.Argument(help="file of dream evaluate, or folder of a run", exists=True)
    ],
    second: Annotated[Path, typer.Argument(help="the other one", exists=True)],
    first_model: Annotated[
        str | None, typer.Option(help="which model of the first, if it holds several")
    ] = None,
    second_model: Annotated[
        str | None, typer.Option(help="which model of the second, if it holds several")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the resampling")] = 0,
    allow_different: Annotated[
        bool,
        typer.Option("--allow-different", help="compare figures of other settings or data too"),
    ] = False,
) -> None:
    """Test whether two evaluations differ by more than chance over the queries."""
    with loading_libraries():
        from dream_training.evaluation import pairing, read_evaluations
        from dream_training.evaluation.paired import describe_p

    console = show_on(make_console())
    a = pairing.choose_model(read_evaluations(first), first_model, first, "first-model")
    b = pairing.choose_model(read_evaluations(second), second_model, second, "second-model")
    warnings = pairing.check_settings(a, b, allow_different)
    comparisons = pairing.compare_evaluations(a, b, seed)
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
        "number of tasks, and say nothing about other training seeds."
    )
