"""``dream demo``: train a retriever on docstrings and show what it learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dream_training.console import loading_libraries


def demo(
    output_dir: Annotated[Path, typer.Option(help="where models, metrics and plots go")] = Path(
        "runs/demo"
    ),
    reader: Annotated[
        str, typer.Option(help="folder, GGUF file or hub name of the frozen language model")
    ] = "smollm2",
    part: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2,
            help="1: a retriever from nothing, 2: a trained one adapted; else both",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps of each part")] = 80,
    seed: Annotated[int, typer.Option(help="of weights, data order and head selection")] = 0,
) -> None:
    """Train retrievers on the documentation of the installed scientific packages."""
    with loading_libraries():
        from dream_training.demo import run_demo

    try:
        run_demo(output_dir, part=part, reader=reader, steps=steps, seed=seed)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
