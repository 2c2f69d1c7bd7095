"""``dream train``: train a retriever as a config says, resume a run, or rehearse one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from dream_training.commands.options import ConfigFile, Overrides
from dream_training.console import loading_libraries, make_console


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="two steps with tiny models, and the plan of the run")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the newest intact checkpoint")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete what an earlier run left in output_dir")
    ] = False,
) -> None:
    """Train a retriever as CONFIG says; any key can be set after it."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    from dream_training.config import load_config

    settings = load_config(config, overrides or [])
    if dry_run:
        with loading_libraries():
            from dream_training.preflight.dry_run import dry_run as rehearse

        rehearse(settings, make_console())
        return
    with loading_libraries():
        from dream_training.distributed import world
        from dream_training.history import describe_best
        from dream_training.training.driver import train as run

    result = run(settings, resume=resume, overwrite=overwrite)
    if world.is_main():
        typer.echo(f'\nThe retriever: SentenceTransformer("{result.path}")')
        if what := describe_best(result.history):
            make_console().print(what)
        typer.echo(f"The curve:     {Path(settings.output.output_dir) / 'curve.png'}")
    world.leave()
    if result.interrupted:
        raise typer.Exit(128 + (result.signal or signal.SIGINT))
