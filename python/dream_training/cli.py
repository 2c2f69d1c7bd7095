"""The ``dream`` command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from dream_training.commands.data_app import app as data_app
from dream_training.commands.options import Device, Output, Split, TargetFrom, TrustRemoteCode
from dream_training.console import loading_libraries, make_console
from dream_training.distributed.launched import refuse_several
from dream_training.startup import find_datasets_cache, quieten_libraries

app = typer.Typer(
    help="Train dense retrievers from a frozen language model's own next-token loss.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data", short_help="Look at training data, write it, give it targets.")

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Argument(metavar="KEY=VALUE", help="config keys to set, such as max_steps=200"),
]


@app.command(short_help="Train a retriever on docstrings, and show what it learnt.")
def demo(
    output_dir: Annotated[Path, typer.Option(help="where models, metrics and plots go")] = Path(
        "runs/demo"
    ),
    reader: Annotated[
        str, typer.Option(help="folder or hub name of the frozen language model")
    ] = "smollm2",
    part: Annotated[
        Optional[int],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(
            min=1, max=2, help="1: a retriever from nothing, 2: a trained one adapted; else both"
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


@app.command(short_help="Train a retriever as a config says.")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file", exists=True, dir_okay=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="two steps with tiny models, and the plan of the run")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint that is whole")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete what an earlier run left in output_dir")
    ] = False,
) -> None:
    """Train a retriever as CONFIG says; any key can be set behind it."""
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
        typer.echo(f"The curve:     {Path(settings.output_dir) / 'curve.png'}")
    world.leave()
    if result.interrupted:
        raise typer.Exit(128 + (result.signal or signal.SIGINT))


@app.command(short_help="Train several objectives or settings, in one table.")
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file", exists=True, dir_okay=False)],
    overrides: Overrides = None,
    run: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="train only this run of the config; may be repeated"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace results of other settings")
    ] = False,
) -> None:
    """Train several objectives or settings with equal budgets and seeds, in one table.

    CONFIG may have a section "compare" with "runs" (by name, the keys in which each differs;
    by default every objective), "seeds", "evaluate" (more BEIR folders) and "keep_models".
    What has its result already is not trained again.
    """
    with loading_libraries():
        from dream_training.commands.compare import run_compare

    try:
        run_compare(config, overrides or [], run or [], overwrite)
    except KeyboardInterrupt:
        typer.echo("\nStopped. What is complete is kept: run the same command to go on.")
        raise typer.Exit(130) from None


@app.command(short_help="Say in a minute whether a run can learn.")
def doctor(
    config: Annotated[Path, typer.Argument(help="YAML file", exists=True, dir_okay=False)],
    overrides: Overrides = None,
) -> None:
    """Say in about a minute whether a run can learn; exit code 1 if something is at fault."""
    with loading_libraries():
        from dream_training.commands.doctor import run_doctor

    if not run_doctor(config, overrides or []):
        raise typer.Exit(1)


@app.command(short_help="Rank the reader's heads by how well they serve.")
def heads(
    reader: Annotated[str, typer.Option(help="folder or hub name of the language model")],
    data: Annotated[
        str, typer.Option(help="training data of any form; qr criteria need known positives")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="head file, .yaml or .json, - for standard output; with --compare a folder"
        ),
    ] = None,
    criterion: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="loss_gradient (the default), qr_mass, qr_ndcg (these two need positives) or "
            "random; may be repeated with --compare, where all of them are the default"
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="several criteria: what they share and what they do")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="random draws with --compare")] = 5,
    train: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="with --compare: train as this config says with the heads of each choice",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each choice")] = 3,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="with --train: replace results of other settings")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="heads to choose")] = 16,
    examples: Annotated[int, typer.Option(min=2, help="training lines to look at")] = 96,
    pool_size: Annotated[int, typer.Option(min=2, help="documents per pool")] = 16,
    context: Annotated[str, typer.Option(help="independent or joint reading")] = "independent",
    passage_max_len: Annotated[int, typer.Option(min=1, help="tokens of a document")] = 128,
    null_query: Annotated[str, typer.Option(help="the query that says nothing")] = "N/A",
    token_filter: Annotated[
        bool, typer.Option(help="drop tokens far below their document's mean (qr criteria)")
    ] = False,
    point: Annotated[
        str, typer.Option(help="where loss_gradient differentiates: own or uniform weights")
    ] = "own",
    seed: Annotated[int, typer.Option(help="of the choice of examples, and of random heads")] = 0,
    split: Split = "train",
    target_from: TargetFrom = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank the reader's heads by how well they pass on which document is read.

    With --compare, what is there already in the folder is not measured again: a long
    comparison may be stopped, and gone on with by the same command.
    """
    with loading_libraries():
        from dream_training.commands.heads import HeadOptions, run_head_comparison, run_heads

    options = HeadOptions(
        reader=reader,
        data=data,
        top_k=top_k,
        examples=examples,
        pool_size=pool_size,
        context=context,
        passage_max_len=passage_max_len,
        null_query=null_query,
        token_filter=token_filter,
        point=point,
        seed=seed,
        split=split,
        target_from=target_from,
        trust_remote_code=trust_remote_code,
    )
    if compare:
        try:
            run_head_comparison(
                options,
                output or Path("head-comparison"),
                criteria=criterion or [],
                draws=draws,
                train=train,
                seeds=seeds,
                overwrite=overwrite,
            )
        except KeyboardInterrupt:
            typer.echo("\nStopped. What is complete is kept: run the same command to go on.")
            raise typer.Exit(130) from None
        return
    if train is not None or len(criterion or []) > 1:
        raise ValueError("--train and several criteria need --compare")
    run_heads(options, output or Path("heads.yaml"), (criterion or ["loss_gradient"])[0])


@app.command(short_help="Add candidates that BM25 or a retriever ranks high.")
def mine(
    data: Annotated[str, typer.Argument(help="training data of any form")],
    output: Output,
    retriever: Annotated[
        str, typer.Option(help="bm25, or a sentence-transformers model: folder or hub name")
    ] = "bm25",
    corpus: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="BEIR folder or file of lines with text; by default the data's own"),
    ] = None,
    per_query: Annotated[int, typer.Option(min=1, help="candidates to add to a line")] = 7,
    first_rank: Annotated[int, typer.Option(min=1, help="of the ranks they come from")] = 1,
    last_rank: Annotated[int, typer.Option(min=1, help="of the ranks they come from")] = 100,
    choose: Annotated[str, typer.Option(help="random ones of these ranks, or the best")] = "random",
    exclude_answers: Annotated[
        bool, typer.Option(help="leave out documents in which an answer occurs")
    ] = False,
    keep_candidates: Annotated[
        bool, typer.Option(help="keep the candidates that a line has besides its positives")
    ] = False,
    split: Split = "train",
    target_from: TargetFrom = None,
    query_max_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="tokens of a query that are encoded"),
    ] = None,
    passage_max_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="tokens of a document that are encoded"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts encoded at once")] = 32,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="of the random choice")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add candidates to training lines: documents that BM25 or a retriever ranks high."""
    with loading_libraries():
        from dream_training.commands.mine import run_mine
        from dream_training.data.mining import MiningOptions

    run_mine(
        data=data,
        output=output,
        retriever=retriever,
        corpus=corpus,
        options=MiningOptions(
            per_query=per_query,
            first_rank=first_rank,
            last_rank=last_rank,
            choose=choose,
            exclude_answers=exclude_answers,
            keep_candidates=keep_candidates,
            seed=seed,
        ),
        split=split,
        target_from=target_from,
        query_max_len=query_max_len,
        passage_max_len=passage_max_len,
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )


@app.command(short_help="Print nDCG@10 and recall@10 of retrievers.")
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|FOLDER",
            help="sentence-transformers models (folder or hub name), and BEIR folders",
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="separated by commas: names of mteb's retrieval tasks, beir:NAME for a set that "
            "BEIR publishes, BEIR folders, beir9 (nine public sets of BEIR that papers often "
            "report; which nine the DREAM paper took is not known to us), rteb14 (RTEB's English "
            "open tasks)"
        ),
    ] = "",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="JSON file for all figures, those of every query too; - for standard output"
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="qrels/<split>.tsv of BEIR folders")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="texts encoded at once")] = 32,
    query_max_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="tokens of a query; the model's own limit by default"),
    ] = None,
    passage_max_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="tokens of a document; the model's own limit by default"),
    ] = None,
    processes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="processes that encode documents, one for each GPU if any"),
    ] = None,
    devices: Annotated[
        str, typer.Option(help="a process for each of these instead: cuda:0,cuda:1")
    ] = "",
    cache_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="where sets of BEIR are kept"),
    ] = None,
    keep_identical_ids: Annotated[
        bool,
        typer.Option(
            "--keep-identical-ids",
            help="rank the document that has a query's id too; by default only where it is "
            "relevant, as beir and mteb's tasks leave out queries that are documents themselves",
        ),
    ] = False,
    bm25: Annotated[bool, typer.Option(help="evaluate BM25 on BEIR folders as well")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print nDCG@10 and recall@10 of retrievers on BEIR folders and mteb tasks."""
    with loading_libraries():
        from dream_training.commands.evaluate import choose_devices, run_evaluate
        from dream_training.evaluation.options import EvaluationOptions

    run_evaluate(
        arguments,
        tasks=tasks,
        output=output,
        options=EvaluationOptions(
            split=split,
            batch_size=batch_size,
            query_max_len=query_max_len,
            passage_max_len=passage_max_len,
            devices=choose_devices(processes, devices),
            cache_dir=cache_dir,
            keep_identical_ids=keep_identical_ids,
        ),
        bm25=bm25,
        trust_remote_code=trust_remote_code,
    )


@app.command(short_help="Test whether two evaluations differ by luck.")
def compare_runs(
    first: Annotated[
        Path, typer.Argument(help="file of dream evaluate, or folder of a run", exists=True)
    ],
    second: Annotated[Path, typer.Argument(help="the other one", exists=True)],
    first_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="which model of the first, where it holds several"),
    ] = None,
    second_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="which model of the second"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the resampling")] = 0,
    allow_different: Annotated[
        bool,
        typer.Option("--allow-different", help="compare figures of other settings or data too"),
    ] = False,
) -> None:
    """Test whether two evaluations differ by more than luck with the queries."""
    with loading_libraries():
        from dream_training.commands.compare_runs import run_compare

    run_compare(
        first,
        second,
        first_model=first_model,
        second_model=second_model,
        seed=seed,
        allow_different=allow_different,
    )


@app.command(short_help="Write one HTML page of one or several runs.")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="folders of runs (output_dir)", exists=True, file_okay=False),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="HTML file, - for standard output; report.html, in the folder of a lone run, "
            "by default"
        ),
    ] = None,
) -> None:
    """Write one HTML page of one or several runs: curves, tables, heads, examples."""
    with loading_libraries():
        from dream_training.commands.report import run_report

    run_report(runs, output)


@app.command(
    short_help="Measure speed and memory against peers.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure speed and memory against peers; see dream bench --help."""
    try:
        from dream_benchmarks.cli import app as suite
    except ModuleNotFoundError as error:
        if error.name != "dream_benchmarks":
            raise
        raise ModuleNotFoundError(
            "the benchmark suite is not installed; in a checkout run: python -m benchmarks"
        ) from None
    suite(context.args, prog_name="dream bench")


# What bad input, a full disk or too little memory end in.
_EXPECTED = (OSError, ModuleNotFoundError, TypeError, ValueError, MemoryError, FloatingPointError)


def main() -> None:
    """Run the command; mistakes of the user end in one line, not in a traceback."""
    quieten_libraries()
    find_datasets_cache()
    try:
        if sys.argv[1:2] != ["train"] or "--dry-run" in sys.argv:
            refuse_several(" ".join(["dream", *sys.argv[1:2]]))
        app()
    except _EXPECTED as error:
        if os.environ.get("DREAM_TRACEBACK"):
            raise
        sys.exit(f"dream: {error}")


if __name__ == "__main__":
    main()
