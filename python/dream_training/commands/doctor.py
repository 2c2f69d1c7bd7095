"""``dream doctor``: print the doctor's findings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dream_training.config import load_config
from dream_training.console import make_console, print_entry, show_on, shows_progress
from dream_training.preflight.check import FAULT, OK, WARNING, Check
from dream_training.preflight.diagnosis import diagnose, has_fault

_STYLES = {OK: "green", WARNING: "yellow", FAULT: "bold red"}
_WIDTH = 15


@shows_progress
def run_doctor(config: Path, overrides: Sequence[str]) -> bool:
    """Examine the run that a config describes.

    Returns:
        Whether nothing is at fault.
    """
    console = show_on(make_console())
    settings = load_config(config, overrides)
    checks = diagnose(settings, report=lambda check: _print(console, check))
    counts = {status: sum(c.status == status for c in checks) for status in (FAULT, WARNING)}
    if has_fault(checks):
        console.print(f"\nThis run should not be started: {counts[FAULT]} at fault.")
    elif counts[WARNING]:
        console.print(f"\nThis run can learn, with {counts[WARNING]} to look at.")
    else:
        console.print("\nThis run can learn.")
    return not has_fault(checks)


def _print(console: Console, check: Check) -> None:
    head = f"{check.status:<8}{check.name:<{_WIDTH}}  "
    print_entry(console, head, check.figure, _STYLES[check.status])
    if check.advice:
        print_entry(console, f"{'':<{len(head)}}-> ", check.advice)
