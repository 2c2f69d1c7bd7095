"""Options that several commands share, and what a stopped command says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file", exists=True, dir_okay=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="config keys to set, such as max_steps=200"),
]
Source = Annotated[
    str, typer.Argument(help="training data of any form: file, folder, or data set of the hub")
]
Output = Annotated[Path, typer.Option(help="JSONL file to write, - for standard output")]
Split = Annotated[str, typer.Option(help="of a BEIR folder's qrels or a data set")]
TargetFrom = Annotated[
    str | None,
    typer.Option(help="answers, positive, positive_sentence, query or a file of targets"),
]
Limit = Annotated[int | None, typer.Option(min=1, help="stop after this many lines")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with a model")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one")
]


@contextmanager
def resumable() -> Iterator[None]:
    """Exit with code 130 on Ctrl-C, and say that the same command resumes what was stopped."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nStopped. What is complete is kept: run the same command to resume.")
        raise typer.Exit(130) from None
