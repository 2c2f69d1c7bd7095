"""``dream compare``: train several objectives or settings, and print and draw a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dream_training.commands.options import ConfigFile, Overrides, resumable
from dream_training.console import (
    loading_libraries,
    make_console,
    print_paths,
    show_on,
    shows_progress,
)


@shows_progress
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Annotated[
        list[str] | None, typer.Option(help="train only this run of the config; may be repeated")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace results of other settings")
    ] = False,
) -> None:
    """Train several objectives or settings with equal budgets and seeds, in one table.

    CONFIG may have a section "compare" with "runs" (by name, the keys in which each differs;
    by default every objective), "seeds", "evaluate" (more BEIR folders) and "keep_models".
    A run that has its result already is not trained again.
    """
    with loading_libraries():
        from dream_training.comparisons import objectives

    console = show_on(make_console())
    comparison = objectives.load_comparison(config, overrides or [])
    with resumable():
        rows = objectives.run_comparison(comparison, console, run or [], overwrite)
    for table in objectives.comparison_tables(rows):
        console.print("", table)
    folder = Path(comparison.base.output.output_dir)
    console.print()
    print_paths(
        console,
        {"The tables:": folder / "comparison.json", "The plot:": folder / "comparison.png"},
    )
