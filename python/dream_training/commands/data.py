"""``dream data``: training data prepared, described, and given targets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from dream_kernels.parsing import read_text
from dream_training.choices import DTYPES, check_choice
from dream_training.console import (
    make_console,
    make_table,
    progress,
    show_on,
    shows_progress,
    tracked,
)
from dream_training.data.generated_targets import GenerationCounts, write_targets
from dream_training.data.jsonl import iterate_training_rows, write_training_rows
from dream_training.data.raw_text import TextLengths, count_tokens
from dream_training.data.statistics import Lengths, describe, token_lengths


@shows_progress
def run_prepare(
    *,
    source: str,
    output: Path,
    split: str,
    target_from: str | None,
    limit: int | None,
    tokenizer: str | None,
    passage_len: int,
    query_len: int,
    target_len: int,
    trust_remote_code: bool = False,
) -> None:
    """Run ``dream data prepare``; the arguments are its options."""
    console = show_on(make_console(beside=output))
    lengths = TextLengths(
        passage_len,
        query_len,
        target_len,
        None
        if tokenizer is None
        else count_tokens(_load_tokenizer(tokenizer, trust_remote_code, "tokenizer")),
    )
    rows = iterate_training_rows(
        source, split=split, target_from=target_from, text_lengths=lengths, streaming=True
    )
    written = write_training_rows(output, tracked(islice(rows, limit), "writing lines", limit))
    console.print(f"{written} lines: {output}", soft_wrap=True)


@shows_progress
def run_stats(
    *,
    source: str,
    split: str,
    target_from: str | None,
    limit: int | None,
    reader: str | None,
    retriever: str | None,
    query_max_len: int,
    passage_max_len: int,
    target_max_len: int,
    as_json: bool,
    trust_remote_code: bool = False,
) -> None:
    """Run ``dream data stats``; the arguments are its options."""
    console = make_console()
    if not as_json:  # standard output is for JSON alone then
        show_on(console)
    limits = {"query": query_max_len, "document": passage_max_len}
    lengths = []
    if reader is not None:
        count = token_lengths(_load_tokenizer(reader, trust_remote_code, "reader"))
        own = {**limits, "target": target_max_len}
        lengths.append(Lengths("tokens of the reader", count, own))
    if retriever is not None:
        tokenizer = _load_tokenizer(retriever, trust_remote_code, "retriever")
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
    if as_json:
        print(json.dumps({"source": source, **result}, indent=1))
        return
    console.print(source, soft_wrap=True)
    for table in _tables(result):
        console.print("", table)
    for i, line in enumerate(_suspicions(result)):
        console.print("\n" * (i == 0) + line, soft_wrap=True)


@shows_progress
def run_targets(
    *,
    source: str,
    output: Path,
    reader: str,
    split: str,
    limit: int | None,
    instruction: Path | None,
    passage_max_len: int,
    max_new_tokens: int,
    batch_size: int,
    overwrite: bool,
    dtype: str,
    device: str | None,
    trust_remote_code: bool = False,
) -> None:
    """Run ``dream data targets``; the arguments are its options."""
    import torch

    from dream_training.models.loading import resolve_model
    from dream_training.models.text_tokens import check_vocabulary
    from dream_training.trust import load_language_model, load_tokenizer

    check_choice("dtype", dtype, DTYPES)
    console = show_on(make_console(beside=output))
    rows = list(islice(iterate_training_rows(source, split=split, need_target=False), limit))
    path = resolve_model(reader, dtype)
    model = load_language_model(
        path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        what="reader",
    ).eval()
    model_tokenizer = load_tokenizer(path, trust_remote_code, "reader")
    check_vocabulary(model_tokenizer, model, "reader")
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    counts = GenerationCounts()
    options: dict[str, Any] = {}
    if instruction is not None:
        options["instruction"] = read_text(instruction)
    with progress("writing targets", len(rows)) as work:
        written = write_targets(
            rows,
            model,
            model_tokenizer,
            counts,
            passage_max_len=passage_max_len,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=lambda c: work.update(sum(vars(c).values())),
            **options,
        )
        total = write_training_rows(output, written)
    console.print(f"{total} lines: {output}", soft_wrap=True)
    console.print(
        f"{counts.written} targets were written by {reader}, {counts.kept} were there, "
        f"{counts.empty} lines were left out because it wrote nothing"
    )


def _load_tokenizer(name: str, trust_remote_code: bool, what: str) -> Any:
    from dream_training.models.loading import resolve_model
    from dream_training.trust import load_tokenizer

    return load_tokenizer(resolve_model(name), trust_remote_code, what)


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    lines = result["lines"]
    table = make_table("", "")
    table.show_header = False
    for name, value in (
        ("lines", f"{lines:,}"),
        ("with a target", _part(result["with_target"], lines)),
        ("with answers", _part(result["with_answers"], lines)),
        ("with a known positive", _part(result["with_positive"], lines)),
        ("with several positives", _part(result["with_several_positives"], lines)),
        ("repeated queries", f"{result['repeated_queries']:,}"),
        ("repeated query and target", f"{result['repeated_lines']:,}"),
        ("distinct documents", f"{result['documents']:,}"),
        ("documents in several lines", f"{result['shared_documents']:,}"),
        ("equal candidates in one line", f"{result['repeated_candidates']:,}"),
        ("target stands in the positive", _percent(result["target_in_positive"])),
        ("target stands in another candidate", _percent(result["target_in_other"])),
        ("target stands in a candidate, none known", _percent(result["target_in_candidate"])),
        ("a candidate begins with the query", _percent(result["query_begins_candidate"])),
    ):
        table.add_row(name, value)
    yield table

    table = make_table("lengths", "min", "median", "90 %", "max", "mean", "limit", "cut")
    table.add_row("candidates of a line", *_numbers(result["candidates"]), "", "")
    for unit, fields in result["lengths"].items():
        table.add_section()
        for name, values in fields.items():
            limit = str(values["limit"]) if "limit" in values else ""
            cut = _percent(values["cut"]) if "limit" in values else ""
            table.add_row(f"{name}, {unit}", *_numbers(values), limit, cut)
    yield table


def _suspicions(result: dict[str, Any]) -> Iterator[str]:
    """Lines of text: places are often too long for the cells of a table."""
    for kind, found in result["suspicious"].items():
        yield f"{found['count']:,} {'line' if found['count'] == 1 else 'lines'}: {kind}"
        yield from (f"    {place}" for place in found["first"])


def _numbers(values: dict[str, float]) -> Iterable[str]:
    whole = (f"{values[name]:,.10g}" for name in ("min", "median", "p90", "max"))
    return (*whole, f"{values['mean']:,.1f}")


def _part(count: int, lines: int) -> str:
    return f"{count:,} ({count / lines:.1%})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
