"""``dream report``: one HTML page of one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dream_training.console import loading_libraries, make_console, show_on, shows_progress


@shows_progress
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="folders of runs (output_dir)", exists=True, file_okay=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="HTML file, - for standard output; report.html, in the folder of a lone run, "
            "by default"
        ),
    ] = None,
) -> None:
    """Write one HTML page of one or several runs: curves, tables, heads, examples."""
    with loading_libraries():
        from dream_kernels.files import is_stream
        from dream_training.report import read_runs, write_report

    if output is None:
        output = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    console = show_on(make_console(beside=output))
    path = write_report(read_runs(runs), output)
    size = "" if is_stream(path) else f" ({path.stat().st_size / 1024:,.0f} KiB)"
    console.print(f"The report: {path}{size}", soft_wrap=True)
