"""``dream bench``: the benchmark suite, where it is installed."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Measure speed and memory against peers; see dream bench --help."""
    try:
        from dream_benchmarks.cli import app
    except ModuleNotFoundError as error:
        if error.name != "dream_benchmarks":
            raise
        raise ModuleNotFoundError(
            "the benchmark suite is not installed; in a checkout run: python -m benchmarks"
        ) from None
    app(context.args, prog_name="dream bench")
