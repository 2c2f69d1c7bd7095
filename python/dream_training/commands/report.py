"""``dream report``: one HTML page of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dream_kernels.files import is_stream
from dream_training.console import make_console, show_on, shows_progress
from dream_training.report.page import write_report
from dream_training.report.run_folder import read_runs


@shows_progress
def run_report(
    folders: Sequence[Path], output: Path | None, console: Console | None = None
) -> Path:
    """Run the command; the arguments are its own.

    Args:
        folders: ``output_dir`` of each run.
        output: HTML file; ``report.html`` in the folder of a lone run, or here, by default.
        console: where to print.

    Raises:
        FileNotFoundError: a folder is not that of a run that has ended.
        ValueError: a file of a run holds something else.
    """
    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    console = show_on(console or make_console(beside=output))
    path = write_report(read_runs(folders), output)
    size = "" if is_stream(path) else f" ({path.stat().st_size / 1024:,.0f} KiB)"
    console.print(f"The report: {path}{size}", soft_wrap=True)
    return path
