"""``dream compare``: train, print and draw a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dream_training.training.comparison import comparison_table, load_comparison, run_comparison


def run_compare(config: Path, overrides: Sequence[str], only: Sequence[str]) -> None:
    """Run the command; the arguments are its own."""
    console = Console()
    comparison = load_comparison(config, overrides)
    rows = run_comparison(comparison, console, only)
    console.print(comparison_table(rows))
    folder = Path(comparison.base.output_dir)
    console.print(f"The table: {folder / 'comparison.json'}", soft_wrap=True)
    console.print(f"The plot:  {folder / 'comparison.png'}", soft_wrap=True)
