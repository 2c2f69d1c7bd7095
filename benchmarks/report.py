"""Report of the records: plots and a page of tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dream_kernels.files import write_text

from .environment import device_slug
from .plots import draw
from .records import read
from .scaling import fitted_exponent, series
from .tables import (
    STEP_PHASES,
    describe_case,
    kernel_columns,
    kernel_row,
    number,
    overhead_case,
    overhead_row,
    phase_row,
    step_columns,
    step_row,
    teaching_columns,
    teaching_row,
    three_digits,
)
from .targets import findings

Record = dict[str, Any]

HEAD = """# Results

Written by `python -m benchmarks report` from the records in this folder; edits are lost.
How they were measured is described in `benchmarks/README.md`.

"""
_COMMANDS = {
    "kernel": "python -m benchmarks kernel",
    "overhead": "python -m benchmarks kernel",
    "scaling": "python -m benchmarks scaling",
    "step": "python -m benchmarks step",
    "teaching": "python -m benchmarks step --way teaching",
    "acceptance": "python -m benchmarks gpu-acceptance",
    "compare": "python -m benchmarks compare --base REV",
}


def write_page(results: Path) -> list[Path]:
    """Draw the plots into ``results/plots`` and write the tables into ``results/README.md``.

    Returns:
        The files written.

    Raises:
        ValueError: there are no records, a line is not one, or this command did not write the page.
    """
    records = read(results)
    if not records:
        raise ValueError(f"there are no records in {results}: run a suite first")
    page = results / "README.md"
    if page.exists() and not page.read_text(encoding="utf-8").startswith(HEAD):
        raise ValueError(f"{page} must be a page that this command wrote, and begins otherwise")
    plots = draw(records, results / "plots")
    write_text(page, HEAD + render(records, plots, results))
    return [*plots, page]


def render(records: Sequence[Record], plots: Iterable[Path], root: Path) -> str:
    """The records as Markdown, by device; links are relative to ``root``."""
    parts = []
    plots = list(plots)
    for device in dict.fromkeys(r["environment"]["device"] for r in records):
        own = [r for r in records if r["environment"]["device"] == device]
        parts.append(f"## {device}\n")
        parts += [_environment(own), _targets(own)]
        by_suite: dict[str, list[Record]] = {}
        for record in own:
            by_suite.setdefault(record["suite"], []).append(record)
        for suite, rows in by_suite.items():
            if suite in ("kernel", "acceptance", "compare"):
                parts.append(_kernel(suite, rows))
            elif suite == "scaling":
                parts.append(_scaling(rows))
            elif suite == "step":
                parts.append(_steps(rows))
            elif suite == "teaching":
                parts.append(_teaching(rows))
            elif suite == "overhead":
                parts.append(_overhead(rows))
            elif suite == "gpu tests":
                parts.append(_tests(rows))
        slug = device_slug(device)
        parts += [
            f"![{path.stem}]({os.path.relpath(path, root)})\n"
            for path in plots
            if path.stem.endswith(slug)
        ]
    return "\n".join(part for part in parts if part)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|",
    ]
    for row in rows:
        cells = [*row, *[""] * (len(columns) - len(row))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _environment(records: Sequence[Record]) -> str:
    lines = []
    for suite in dict.fromkeys(r["suite"] for r in records):
        rows = [r for r in records if r["suite"] == suite]
        environment = rows[0]["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
        driver = f", driver {environment['driver']}" if environment["driver"] else ""
        command = f" by `{_COMMANDS[suite]}`" if suite in _COMMANDS else ""
        lines.append(
            f"- {suite}: {environment['date'][:10]}, commit {environment['commit']}, "
            f"{environment['threads']} threads{driver}, {versions}{command}"
        )
        ceilings = rows[0].get("ceilings")
        if ceilings and ceilings["copy"]:
            rates = ", ".join(f"{v / 1e9:,.0f} GFLOP/s {k}" for k, v in ceilings["gemm"].items())
            copied = f"copy {ceilings['copy'] / 1e9:,.1f} GB/s"
            lines.append(f"  (ceilings on the spot: matrix product {rates}; {copied})")
    return "\n".join(lines) + "\n"


def _targets(records: Sequence[Record]) -> str:
    found = findings(records)
    if not found:
        return ""
    rows = [finding.row() for finding in found]
    return markdown(["to be reached", "bound", "measured", "met"], rows)


def _kernel(suite: str, records: Sequence[Record]) -> str:
    """One table for each case; reasons of refusals once, below."""
    parts: list[str] = []
    reasons: dict[str, None] = {}
    cases = list({str(r["case"]): r["case"] for r in records}.values())
    for case in cases:
        rows = [r for r in records if r["case"] == case]
        fine = [r for r in rows if r["status"] == "ok"]
        if suite == "compare":
            cells = [[f"{r['peer']} at {r['revision']}", *kernel_row(r)[1:]] for r in fine]
        else:
            cells = [kernel_row(r) for r in fine]
        parts.append(f"**{describe_case(case)}**\n\n" + markdown(kernel_columns(), cells))
        for row in rows:
            if row["status"] != "ok":
                reasons[f"{row['peer']}: {row['status']}, {row['reason']}"] = None
    if reasons:
        parts.append("Not timed: " + "; ".join(reasons) + ".\n")
    return "\n".join(parts)


def _overhead(records: Sequence[Record]) -> str:
    parts = []
    for case in dict.fromkeys(map(overhead_case, records)):
        own = [r for r in records if overhead_case(r) == case and r["status"] == "ok"]
        parts.append(markdown([f"{case}, µs", "forward", "backward"], map(overhead_row, own)))
    return "\n".join(parts)


def _scaling(records: Sequence[Record]) -> str:
    parts = []
    for axis in dict.fromkeys(r["axis"] for r in records):
        own = [r for r in records if r["axis"] == axis]
        sizes = sorted({r["value"] for r in own})
        rows = []
        for peer in dict.fromkeys(r["peer"] for r in records):
            points = dict(series(records, axis, peer, "total"))
            if points:
                cells = [three_digits(1e3 * points[x]) if x in points else "-" for x in sizes]
                rows.append([peer, number(fitted_exponent(list(points.items())), 2), *cells])
        columns = [f"ms against {axis}", "exponent", *(f"{size:g}" for size in sizes)]
        if rows:
            parts.append(markdown(columns, rows))
        else:
            reasons = dict.fromkeys(r["reason"] for r in own)
            parts.append(f"Not timed against {axis}: {'; '.join(reasons)}.\n")
    return "\n".join(parts)


def _steps(records: Sequence[Record]) -> str:
    parts = []
    for model in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == model]
        first = own[0]
        parts.append(
            f"**One training step, {model} in {first['dtype']}, {first['batch']} queries, "
            f"{first['documents']} documents of {first['document_tokens']} tokens**\n"
        )
        parts.append(markdown(step_columns(), [step_row(r) for r in own]))
        parts.append(markdown(["seconds", *STEP_PHASES], [phase_row(r) for r in own]))
        reasons = [f"{r['peer']}: {r['reason']}" for r in own if r["reason"]]
        if reasons:
            parts.append("; ".join(reasons) + "\n")
    return "\n".join(parts)


def _teaching(records: Sequence[Record]) -> str:
    parts = []
    for model in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == model]
        parts.append(
            f"**Teaching, reader {model} in {own[0]['dtype']}, documents of "
            f"{own[0]['document_tokens']} tokens**\n"
        )
        parts.append(markdown(teaching_columns(), [teaching_row(r) for r in own]))
        reasons = [f"{r['peer']}: {r['reason']}" for r in own if r["reason"]]
        if reasons:
            parts.append("; ".join(reasons) + "\n")
    return "\n".join(parts)


def _tests(records: Sequence[Record]) -> str:
    rows = [[r["peer"], r["status"], f"{r['seconds']:.0f}", r["reason"] or ""] for r in records]
    return markdown(["check", "status", "s", "reason"], rows)
