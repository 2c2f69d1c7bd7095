"""``dream compare``: train, print and draw a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dream_training.comparisons.objectives import comparison_tables, load_comparison, run_comparison
from dream_training.console import make_console, print_paths, show_on, shows_progress


@shows_progress
def run_compare(
    config: Path, overrides: Sequence[str], only: Sequence[str], overwrite: bool = False
) -> None:
    """Run the command; the arguments are its own."""
    console = show_on(make_console())
    comparison = load_comparison(config, overrides)
    rows = run_comparison(comparison, console, only, overwrite)
    for table in comparison_tables(rows):
        console.print("", table)
    folder = Path(comparison.base.output_dir)
    console.print()
    print_paths(
        console,
        {"The tables:": folder / "comparison.json", "The plot:": folder / "comparison.png"},
    )
