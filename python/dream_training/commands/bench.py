"""``dream bench``: the benchmark suite, where it is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import typer

# A package above this one, so it is found by name, as `python -m` would.
_SUITE = "dream_benchmarks"


def bench(context: typer.Context) -> None:
    """Measure speed and memory against peers; see dream bench --help."""
    if find_spec(_SUITE) is None:
        raise ModuleNotFoundError(
            "the benchmark suite is not installed; in a checkout run: python -m benchmarks"
        )
    import_module(f"{_SUITE}.cli").app(context.args, prog_name="dream bench")
