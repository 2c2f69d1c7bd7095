"""``dream doctor``: say whether a run can learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dream_training.commands.options import ConfigFile, Overrides
from dream_training.console import (
    loading_libraries,
    make_console,
    print_entry,
    show_on,
    shows_progress,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dream_training.preflight.check import Check

_WIDTH = 15


@shows_progress
def doctor(config: ConfigFile, overrides: Overrides = None) -> None:
    """Say in about a minute whether a run can learn; exit code 1 if something is at fault."""
    with loading_libraries():
        from dream_training.config import load_config
        from dream_training.preflight.check import FAULT, WARNING
        from dream_training.preflight.diagnosis import diagnose, has_fault

    console = show_on(make_console())
    settings = load_config(config, overrides or [])
    checks = diagnose(settings, report=lambda check: _print(console, check))
    counts = {status: sum(c.status == status for c in checks) for status in (FAULT, WARNING)}
    if has_fault(checks):
        console.print(f"\nThis run should not be started: {counts[FAULT]} at fault.")
        raise typer.Exit(1)
    warned = f", with {counts[WARNING]} to look at" if counts[WARNING] else ""
    console.print(f"\nThis run can learn{warned}.")


def _print(console: Console, check: Check) -> None:
    from dream_training.preflight.check import FAULT, OK, WARNING

    style = {OK: "green", WARNING: "yellow", FAULT: "bold red"}[check.status]
    head = f"{check.status:<8}{check.name:<{_WIDTH}}  "
    print_entry(console, head, check.figure, style)
    if check.advice:
        print_entry(console, f"{'':<{len(head)}}-> ", check.advice)
