"""``dream data stats``: what training data is like, and what looks wrong in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dream_training.commands.options import Limit, Source, Split, TargetFrom, TrustRemoteCode
from dream_training.console import (
    make_console,
    show_on,
    shows_progress,
    tracked,
)

Model = Annotated[
    str | None,
    typer.Option(help="folder, GGUF file or hub name: count its tokens, and what is cut"),
]
MaxLen = Annotated[int, typer.Option(min=1, help="tokens that are kept")]
TeacherTemperature = Annotated[
    float, typer.Option(help="of a folder of dream teach: divides the teacher's logits, in nats")
]


@shows_progress
def stats(
    source: Source,
    split: Split = "train",
    target_from: TargetFrom = None,
    limit: Limit = None,
    reader: Model = None,
    retriever: Model = None,
    query_max_len: MaxLen = 32,
    passage_max_len: MaxLen = 128,
    target_max_len: MaxLen = 32,
    teacher_temperature: TeacherTemperature = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Describe training data: lengths, what is cut, what repeats, what looks wrong.

    Of a folder of dream teach: how sure the teacher is, how often it agrees with known
    positives, and which other candidates it prefers to them.
    """
    from dream_training.data.jsonl import iterate_training_rows
    from dream_training.data.statistics import Lengths, describe, token_lengths
    from dream_training.data.statistics_tables import suspicions, tables
    from dream_training.data.taught_folder import is_taught

    if reader is not None or retriever is not None:
        from dream_training.models.loading import load_named_tokenizer

    console = make_console()
    if not as_json:  # standard output is for JSON alone then
        show_on(console)
    if is_taught(source):
        _print_taught(console, source, teacher_temperature, limit, as_json)
        return
    limits = {"query": query_max_len, "document": passage_max_len}
    lengths = []
    if reader is not None:
        count = token_lengths(load_named_tokenizer(reader, trust_remote_code, "reader"))
        own = {**limits, "target": target_max_len}
        lengths.append(Lengths("tokens of the reader", count, own))
    if retriever is not None:
        tokenizer = load_named_tokenizer(retriever, trust_remote_code, "retriever")
        # A language model's tokenizer gets an end-of-sequence token as a retriever's.
        count = token_lengths(tokenizer, max(tokenizer.num_special_tokens_to_add(), 1))
        # It never sees a target.
        fields = ("query", "document")
        lengths.append(Lengths("tokens of the retriever", count, limits, fields))
    bad_lines: list[str] = []
    rows = iterate_training_rows(
        source,
        split=split,
        target_from=target_from,
        need_target=False,
        streaming=True,
        on_bad_line=bad_lines.append,
    )
    result = describe(tracked(islice(rows, limit), "counting lines", limit), lengths, bad_lines)
    _print(console, source, result, tables(result), suspicions(result), as_json)


def _print_taught(
    console: Console, folder: str, teacher_temperature: float, limit: int | None, as_json: bool
) -> None:
    """Print what the verdicts in a folder of ``dream teach`` are like."""
    from dream_training.choices import check_positive
    from dream_training.data.taught_statistics import describe_taught, disagreements, taught_tables

    check_positive("teacher_temperature", teacher_temperature)
    result = describe_taught(folder, teacher_temperature, limit)
    _print(console, folder, result, taught_tables(result), disagreements(result), as_json)


def _print(
    console: Console,
    source: str,
    result: dict[str, Any],
    tables: Iterable[Table],
    lines: Iterable[str],
    as_json: bool,
) -> None:
    """Print what was found, as JSON or as tables and what to look at."""
    if as_json:
        print(json.dumps({"source": source, **result}, indent=1))
        return
    console.print(source, soft_wrap=True)
    for table in tables:
        console.print("", table)
    for i, line in enumerate(lines):
        console.print("\n" * (i == 0) + line, soft_wrap=True)
