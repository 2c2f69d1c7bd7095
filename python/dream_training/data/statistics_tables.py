"""The statistics of a data set as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table

from dream_training.console import make_table


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of what :func:`~dream_training.data.statistics.describe` returned."""
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
        ("target is in the positive", _percent(result["target_in_positive"])),
        ("target is in another candidate", _percent(result["target_in_other"])),
        ("target is in a candidate, none known", _percent(result["target_in_candidate"])),
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


def suspicions(result: dict[str, Any]) -> Iterator[str]:
    """Yield lines of text: places are often too long for table cells."""
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
