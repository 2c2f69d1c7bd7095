"""The commands under ``dream data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dream_training.commands.options import (
    Device,
    Limit,
    Output,
    Source,
    Split,
    TargetFrom,
    TrustRemoteCode,
)
from dream_training.console import loading_libraries

app = typer.Typer(
    help="Look at training data, write it in the project's form, let a model write targets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(short_help="Write training data of any form as JSON lines.")
def prepare(
    source: Source,
    output: Output,
    split: Split = "train",
    target_from: TargetFrom = None,
    limit: Limit = None,
    tokenizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="of text alone: folder or hub name of the model whose tokens count"),
    ] = None,
    passage_len: Annotated[int, typer.Option(min=1, help="words or tokens of a document")] = 90,
    query_len: Annotated[int, typer.Option(min=1, help="words or tokens of a query")] = 16,
    target_len: Annotated[int, typer.Option(min=1, help="words or tokens of a target")] = 32,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write training data of any form as JSON lines that dream train reads.

    Of text without questions (a folder of .txt and .md files, or lines with "text"), a beginning
    becomes the query, its continuation the target, and the passages around it the candidates.
    """
    with loading_libraries():
        from dream_training.commands.data import run_prepare

    run_prepare(
        source=source,
        output=output,
        split=split,
        target_from=target_from,
        limit=limit,
        tokenizer=tokenizer,
        passage_len=passage_len,
        query_len=query_len,
        target_len=target_len,
        trust_remote_code=trust_remote_code,
    )


@app.command(short_help="Describe training data, and what looks wrong in it.")
def stats(
    source: Source,
    split: Split = "train",
    target_from: TargetFrom = None,
    limit: Limit = None,
    reader: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="folder or hub name: count its tokens, and what is cut"),
    ] = None,
    retriever: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="folder or hub name: count its tokens, and what is cut"),
    ] = None,
    query_max_len: Annotated[int, typer.Option(min=1, help="tokens that are left")] = 32,
    passage_max_len: Annotated[int, typer.Option(min=1, help="tokens that are left")] = 128,
    target_max_len: Annotated[int, typer.Option(min=1, help="tokens that are left")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Describe training data: lengths, what is cut, what repeats, what looks wrong."""
    from dream_training.commands.data import run_stats

    run_stats(
        source=source,
        split=split,
        target_from=target_from,
        limit=limit,
        reader=reader,
        retriever=retriever,
        query_max_len=query_max_len,
        passage_max_len=passage_max_len,
        target_max_len=target_max_len,
        as_json=as_json,
        trust_remote_code=trust_remote_code,
    )


@app.command(short_help="Let a language model write the targets.")
def targets(
    source: Source,
    output: Output,
    reader: Annotated[str, typer.Option(help="folder or hub name of the model that writes")],
    split: Split = "train",
    limit: Limit = None,
    instruction: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            exists=True, dir_okay=False, help="text file with {document} and {query} in it"
        ),
    ] = None,
    passage_max_len: Annotated[int, typer.Option(min=1, help="tokens of the passage")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens of a target")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="lines written at once")] = 16,
    overwrite: Annotated[
        bool, typer.Option(help="also for lines that have a target, if they know their positive")
    ] = False,
    dtype: Annotated[str, typer.Option(help="of the weights: auto, float32, bfloat16")] = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Let a language model write targets where lines have a query and a positive, and no answer."""
    with loading_libraries():
        from dream_training.commands.data import run_targets

    run_targets(
        source=source,
        output=output,
        reader=reader,
        split=split,
        limit=limit,
        instruction=instruction,
        passage_max_len=passage_max_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        overwrite=overwrite,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
