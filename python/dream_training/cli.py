"""The ``dream`` command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    help="Train dense retrievers from a frozen language model's own next-token loss.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Argument(metavar="[KEY=VALUE]...", help="config keys to set, such as max_steps=200"),
]


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where models, metrics and plots go")] = Path(
        "runs/demo"
    ),
    reader: Annotated[
        str, typer.Option(help="folder or hub name of the frozen language model")
    ] = "smollm2",
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 80,
    seed: Annotated[int, typer.Option(help="of weights, data order and head selection")] = 0,
) -> None:
    """Train a retriever on the documentation of the installed scientific packages."""
    from dream_training.demo import run_demo

    try:
        run_demo(output_dir, reader=reader, steps=steps, seed=seed)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file", exists=True, dir_okay=False)],
    overrides: Overrides = None,
) -> None:
    """Train a retriever as CONFIG says; any key can be set behind it."""
    from dream_training.config import load_config
    from dream_training.training import train as run

    settings = load_config(config, overrides or [])
    result = run(settings)
    typer.echo(f'\nThe retriever: SentenceTransformer("{result.path}")')
    typer.echo(f"The curve:     {Path(settings.output_dir) / 'curve.png'}")
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def heads(
    reader: Annotated[str, typer.Option(help="folder or hub name of the language model")],
    data: Annotated[
        Path, typer.Option(help="training JSONL whose lines know their positive", exists=True)
    ],
    output: Annotated[Path, typer.Option(help="head file, .yaml or .json")] = Path("heads.yaml"),
    top_k: Annotated[int, typer.Option(min=1, help="heads to print and outline")] = 16,
    examples: Annotated[int, typer.Option(min=2, help="training lines to look at")] = 96,
    pool_size: Annotated[int, typer.Option(min=2, help="documents per pool")] = 16,
    context: Annotated[str, typer.Option(help="independent or joint reading")] = "independent",
    passage_max_len: Annotated[int, typer.Option(min=1, help="tokens of a document")] = 128,
    null_query: Annotated[str, typer.Option(help="the query that says nothing")] = "N/A",
    seed: Annotated[int, typer.Option(help="of the choice of examples")] = 0,
) -> None:
    """Rank the reader's heads by how much a query draws them to its document."""
    from dream_training.head_command import run_heads

    run_heads(
        reader=reader,
        data=data,
        output=output,
        top_k=top_k,
        examples=examples,
        pool_size=pool_size,
        context=context,
        passage_max_len=passage_max_len,
        null_query=null_query,
        seed=seed,
    )


@app.command()
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
        typer.Option(help="JSON file for all figures, those of every query among them"),
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
    bm25: Annotated[bool, typer.Option(help="evaluate BM25 on BEIR folders as well")] = True,
) -> None:
    """Print nDCG@10 and recall@10 of retrievers on BEIR folders and mteb tasks."""
    from dream_training.evaluate_command import choose_devices, run_evaluate
    from dream_training.evaluation.tasks import EvaluationOptions

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
        ),
        bm25=bm25,
    )


@app.command()
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
) -> None:
    """Test whether two evaluations differ by more than luck with the queries."""
    from dream_training.compare_runs_command import run_compare

    run_compare(first, second, first_model=first_model, second_model=second_model, seed=seed)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="folders of runs (output_dir)", exists=True, file_okay=False),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="HTML file; report.html, in the folder of a lone run, by default"),
    ] = None,
) -> None:
    """Write one HTML page of one or several runs: curves, tables, heads, examples."""
    from dream_training.report_command import run_report

    run_report(runs, output)


@app.command(
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


def main() -> None:
    """Run the command; mistakes of the user end in one line, not in a traceback."""
    _quieten_libraries()
    try:
        app()
    except (FileNotFoundError, ModuleNotFoundError, TypeError, ValueError) as error:
        if os.environ.get("DREAM_TRACEBACK"):
            raise
        sys.exit(f"dream: {error}")


def _quieten_libraries() -> None:
    """Keep bars and notes of libraries out of the command's own output; warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when transformers is imported; cut backbones would report every layer left out.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
