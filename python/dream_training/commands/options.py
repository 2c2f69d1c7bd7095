"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Source = Annotated[
    str, typer.Argument(help="training data of any form: file, folder, or data set of the hub")
]
Output = Annotated[Path, typer.Option(help="JSONL file to write, - for standard output")]
Split = Annotated[str, typer.Option(help="of a BEIR folder's qrels or a data set")]
TargetFrom = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(help="answers, positive, positive_sentence or a file of targets"),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="stop after so many lines"),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with a model")
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="cpu, cuda, ...; a GPU where there is one"),
]
