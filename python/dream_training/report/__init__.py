"""``dream report``: one HTML page of one or several runs."""

from dream_training.report.page import write_report
from dream_training.report.run_folder import Run, read_run, read_runs

__all__ = ["Run", "read_run", "read_runs", "write_report"]
