"""``dream heads``: select, write, draw and compare the reader's heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dream_training.commands.options import Split, TargetFrom, TrustRemoteCode, resumable
from dream_training.console import (
    loading_libraries,
    make_console,
    print_paths,
    show_on,
    shows_progress,
)

if TYPE_CHECKING:
    from dream_training.heads.options import HeadOptions

Reader = Annotated[str, typer.Option(help="folder, GGUF file or hub name of the language model")]
Data = Annotated[
    str, typer.Option(help="training data of any form; qr criteria need known positives")
]
HeadFile = Annotated[
    Path | None,
    typer.Option(help="head file, .yaml or .json, - for standard output; with --compare a folder"),
]
Criteria = Annotated[
    list[str] | None,
    typer.Option(
        help="loss_gradient (the default), qr_mass, qr_ndcg (these two need positives) or "
        "random; may be repeated with --compare, where all of them are the default"
    ),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="compare several criteria: heads in common, effect")
]
Train = Annotated[
    Path | None,
    typer.Option(
        help="with --compare: train as this config says with the heads of each choice",
        exists=True,
        dir_okay=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="with --train: replace results of other settings")
]
TokenFilter = Annotated[
    bool, typer.Option(help="drop tokens far below their document's mean (qr criteria)")
]
Point = Annotated[
    str, typer.Option(help="where loss_gradient differentiates: own or uniform weights")
]
Seed = Annotated[int, typer.Option(help="of the choice of examples, and of random heads")]


@shows_progress
def heads(
    reader: Reader,
    data: Data,
    output: HeadFile = None,
    criterion: Criteria = None,
    compare: Compare = False,
    draws: Annotated[int, typer.Option(min=1, help="random draws with --compare")] = 5,
    train: Train = None,
    seeds: Annotated[int, typer.Option(min=1, help="training runs of each choice")] = 3,
    overwrite: Overwrite = False,
    top_k: Annotated[int, typer.Option(min=1, help="heads to choose")] = 16,
    examples: Annotated[int, typer.Option(min=2, help="training lines to look at")] = 96,
    pool_size: Annotated[int, typer.Option(min=2, help="documents per pool")] = 16,
    context: Annotated[str, typer.Option(help="independent or joint reading")] = "independent",
    passage_max_len: Annotated[int, typer.Option(min=1, help="tokens of a document")] = 128,
    null_query: Annotated[str, typer.Option(help="a query without content")] = "N/A",
    token_filter: TokenFilter = False,
    point: Point = "own",
    seed: Seed = 0,
    split: Split = "train",
    target_from: TargetFrom = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank the reader's heads by how well they pass on which document is read.

    With --compare, what is already in the folder is not measured again: a long comparison
    may be stopped, and resumed by the same command.
    """
    with loading_libraries():
        from dream_training.comparisons.head_report import compare_heads
        from dream_training.heads.options import HeadOptions

    options = HeadOptions(
        reader=reader, data=data, top_k=top_k, examples=examples, pool_size=pool_size,
        context=context, passage_max_len=passage_max_len, null_query=null_query,
        token_filter=token_filter, point=point, seed=seed, split=split, target_from=target_from,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if compare:
        folder = output or Path("head-comparison")
        with resumable():
            compare_heads(options, folder, criterion or [], draws, train, seeds, overwrite)
        return
    if train is not None or len(criterion or []) > 1:
        raise ValueError("--train and several criteria need --compare")
    _select(options, output or Path("heads.yaml"), (criterion or ["loss_gradient"])[0])


def _select(options: HeadOptions, output: Path, criterion: str) -> None:
    """Select heads by one criterion; write, draw and print them."""
    from dream_kernels import write_heads
    from dream_kernels.files import is_stream
    from dream_kernels.head_file import head_name
    from dream_training.heads.selection import WITHOUT_LABELS, head_examples, select_heads
    from dream_training.plots import plot_heads

    console = show_on(make_console(beside=output))
    labelled = criterion not in WITHOUT_LABELS
    examples = head_examples(options.read(), options.examples, options.seed, labelled=labelled)
    head_file = select_heads(
        options.load_reader(),
        examples,
        criterion=criterion,
        seed=options.seed,
        **options.selection(),
    )
    head_file = head_file.choose(min(options.top_k, len(head_file.heads)))
    write_heads(output, head_file)
    console.print(f"{'rank':>4}  {'head':>6}  {'score' if head_file.scores else ''}".rstrip())
    for rank, head in enumerate(head_file.heads[: head_file.chosen], 1):
        score = f"  {head_file.scores[head]:.4f}" if head_file.scores else ""
        console.print(f"{rank:>4}  {head_name(*head):>6}{score}")
    console.print()
    ranked = " and the scores of all" if head_file.scores else ""
    paths = {f"These {head_file.chosen} of {len(head_file.heads)} heads{ranked}:": output}
    if head_file.scores and not is_stream(output):
        paths["Their map:"] = plot_heads(head_file, output.with_suffix(".png"))
    print_paths(console, paths)
    left_out = head_file.provenance.get("layers_left_out")
    if left_out:
        console.print(
            f"Layers {', '.join(map(str, left_out))} are left out: they have no attention that "
            "scores can act on, or a sliding window that is too short for the texts."
        )
    preferred = head_file.provenance.get("prefers_the_positive")
    if preferred is not None:
        console.print(f"The loss prefers the document known to be relevant in {preferred:.0%}.")
