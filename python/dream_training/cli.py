"""The ``dream`` command: its subcommands, each in a file of ``commands/``."""

from __future__ import annotations

import os
import sys

import typer

from dream_training.commands.bench import bench
from dream_training.commands.compare import compare
from dream_training.commands.compare_runs import compare_runs
from dream_training.commands.data_prepare import prepare
from dream_training.commands.data_stats import stats
from dream_training.commands.data_targets import targets
from dream_training.commands.demo import demo
from dream_training.commands.doctor import doctor
from dream_training.commands.evaluate import evaluate
from dream_training.commands.heads import heads
from dream_training.commands.mine import mine
from dream_training.commands.report import report
from dream_training.commands.teach import teach
from dream_training.commands.train import train
from dream_training.distributed.launched import refuse_several
from dream_training.startup import find_datasets_cache, quieten_libraries

data = typer.Typer(
    help="Inspect training data, convert it to JSON lines, let a model write targets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data.command(short_help="Write training data of any form as JSON lines.")(prepare)
data.command(short_help="Describe training data, and what looks wrong in it.")(stats)
data.command(short_help="Let a language model write the targets.")(targets)

app = typer.Typer(
    help="Train dense retrievers from a frozen language model's own next-token loss.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(short_help="Train a retriever on docstrings, and show what it learnt.")(demo)
app.command(short_help="Train a retriever as a config says.")(train)
app.command(short_help="Train several objectives or settings, in one table.")(compare)
app.command(short_help="Say in a minute whether a run can learn.")(doctor)
app.command(short_help="Rank the reader's attention heads.")(heads)
app.command(short_help="Add candidates that BM25 or a retriever ranks high.")(mine)
app.command(short_help="Write the reader's verdicts, to train on many times.")(teach)
app.command(short_help="Print nDCG@10 and recall@10 of retrievers.")(evaluate)
app.command(short_help="Test whether two evaluations differ by chance.")(compare_runs)
app.command(short_help="Write one HTML page of one or several runs.")(report)
app.command(
    short_help="Measure speed and memory against peers.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)(bench)
app.add_typer(data, name="data", short_help="Inspect training data, convert it, add targets.")

# What bad input, a full disk or too little memory raise.
_EXPECTED = (OSError, ModuleNotFoundError, TypeError, ValueError, MemoryError, FloatingPointError)


def main() -> None:
    """Run the command; a user's mistake ends in one line, not in a traceback."""
    quieten_libraries()
    find_datasets_cache()
    try:
        if sys.argv[1:2] not in (["train"], ["teach"]) or "--dry-run" in sys.argv:
            refuse_several(" ".join(["dream", *sys.argv[1:2]]))
        app()
    except _EXPECTED as error:
        if os.environ.get("DREAM_TRACEBACK"):
            raise
        sys.exit(f"dream: {error}")


if __name__ == "__main__":
    main()
