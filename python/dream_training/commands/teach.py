"""``dream teach``: write the reader's verdicts on training lines, to train on many times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dream_training.choices import LINES_PER_FILE
from dream_training.commands.options import ConfigFile, Overrides, resumable
from dream_training.console import (
    loading_libraries,
    make_console,
    print_paths,
    show_on,
    shows_progress,
)

Bm25 = Annotated[int, typer.Option(min=0, help="candidates to add that BM25 ranks high")]
Retriever = Annotated[
    int, typer.Option(min=0, help="candidates to add that the config's retriever ranks high")
]
FromBatch = Annotated[
    int, typer.Option(min=0, help="documents of other lines to add, with pool: mined")
]
Neighbours = Annotated[
    int,
    typer.Option(
        min=0,
        help="lines of a batch come in groups of this many that are alike; not with pool: mined",
    ),
]
Corpus = Annotated[
    str | None,
    typer.Option(help="BEIR folder or file of lines with text; by default the data's own"),
]
ExcludeAnswers = Annotated[bool, typer.Option(help="leave out documents in which an answer occurs")]
ShardOption = Annotated[
    str | None, typer.Option(help="teach a share alone: 0/4 to 3/4 in four processes")
]
Append = Annotated[
    bool, typer.Option("--append", help="add lines of the data that the folder does not have")
]
LinesPerFile = Annotated[
    int, typer.Option(min=1, help="lines of a file, of which a crash costs one at most")
]


@shows_progress
def teach(
    config: ConfigFile,
    output: Annotated[Path, typer.Option(help="folder to write, or to resume")],
    overrides: Overrides = None,
    bm25: Bm25 = 0,
    retriever: Retriever = 0,
    from_batch: FromBatch = 0,
    neighbours: Neighbours = 0,
    corpus: Corpus = None,
    first_rank: Annotated[int, typer.Option(min=1, help="best rank to take them from")] = 1,
    last_rank: Annotated[int, typer.Option(min=1, help="last rank to take them from")] = 100,
    choose: Annotated[str, typer.Option(help="random or best of these ranks")] = "random",
    exclude_answers: ExcludeAnswers = False,
    shard: ShardOption = None,
    append: Append = False,
    lines_per_file: LinesPerFile = LINES_PER_FILE,
) -> None:
    """Write the reader's verdict on the candidates of every line, to train on many times.

    CONFIG is that of a training. What is in the folder already is not computed again: a
    long teaching may be stopped, and resumed by the same command. Train on it with
    taught=FOLDER.
    """
    from dream_training.config import load_config

    settings = load_config(config, overrides or [])
    with loading_libraries():
        from dream_training.data.mining import MiningOptions
        from dream_training.distributed import world
        from dream_training.teaching.options import Candidates, Shard
        from dream_training.teaching.teach import teach as run

    ranks = MiningOptions(
        first_rank=first_rank, last_rank=last_rank, choose=choose, exclude_answers=exclude_answers
    )
    with resumable():
        result = run(
            settings,
            output,
            Candidates(bm25, retriever, from_batch, neighbours, corpus, ranks),
            shard=None if shard is None else Shard.parse(shard),
            append=append,
            lines_per_file=lines_per_file,
        )
    if world.is_main():
        console = show_on(make_console())
        console.print(f"{result.lines:,} lines were taught here.")
        if result.flat:
            console.print(
                f"No document changes the target of {result.flat:,} of them: see dream data stats "
                f"{output}"
            )
        if result.absent:
            console.print(
                f"{result.absent:,} of {result.files:,} files are those of other shards, and are "
                "not there yet."
            )
        print_paths(console, {"The verdicts:": output})
    world.leave()
