"""Records as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .scaling import fitted_exponent, series

Record = dict[str, Any]


def describe_case(case: dict[str, Any]) -> str:
    """A case in one line."""
    heads = f"Hq {case['query_heads']} Hkv {case['key_heads']} D {case['head_dim']}"
    prefix = f"prefix {case['prefix']} {'shared' if case['shared'] else 'per query'}, "
    padding = f"{case['padding']} keys of padding in each, " if case.get("padding") else ""
    return (
        f"{case['name']}: {case['dtype']}, B {case['batch']} {heads}, M {case['rows']}, "
        f"{prefix if case['prefix'] else ''}N {case['local']}, C {case['documents']}, "
        f"{padding}"
        f"{case['mode']}, {percent(case['scored'])} of heads scored, "
        f"gradients: {', '.join(case['gradients']) or 'none'}"
    )


def kernel_columns() -> list[str]:
    """Column headers of :func:`kernel_row`."""
    return [
        "peer", "computes", "forward ms", "backward ms", "sum ms", "± %", "ratio", "GFLOP/s",
        "GB/s", "of ceiling", "peak MiB",
    ]  # fmt: skip


def kernel_row(record: Record) -> list[str]:
    """The cells of one record, or the reason why there are none."""
    if record["status"] != "ok":
        return [record["peer"], record["computes"], f"{record['status']}: {record['reason']}"]
    total = record["total"]
    return [
        record["peer"],
        record["computes"],
        milliseconds(record["forward"]),
        milliseconds(record["backward"]),
        milliseconds(total),
        spread(total or record["forward"]),
        number(record["ratio"], 2),
        number(scaled(record["operations_per_second"], 1e9), 0),
        number(scaled(record["bytes_per_second"], 1e9), 1),
        percent(record["share_of_ceiling"]),
        number(scaled(record["peak_bytes"], 2**20), 1),
    ]


def print_kernel(console: Console, records: Sequence[Record], said: set[str]) -> None:
    """Print the records of one case; reasons in ``said`` are not repeated."""
    console.print(f"\n{describe_case(records[0]['case'])}", style="bold")
    print_rows(console, kernel_columns(), [kernel_row(r) for r in records if r["status"] == "ok"])
    for record in records:
        line = f"  {record['peer']}: {record['status']}, {record['reason']}"
        if record["status"] != "ok" and line not in said:
            said.add(line)
            console.print(line, style="dim")


def print_rows(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table; all columns but the first two hold figures.

    Columns that do not fit follow below, with the first column repeated.
    """
    if not rows:
        return
    widths = [
        max(len(line[i]) for line in (columns, *rows) if i < len(line)) for i in range(len(columns))
    ]
    begin = 1
    while begin < len(columns):
        width, end = widths[0], begin
        while end < len(columns) and (end == begin or width + 2 + widths[end] <= console.width):
            width += 2 + widths[end]
            end += 1
        table = Table(box=None, pad_edge=False)
        for i in (0, *range(begin, end)):
            table.add_column(columns[i], justify="left" if i < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *row[begin:end])
        console.print(table)
        begin = end


def print_overhead(console: Console, records: Sequence[Record]) -> None:
    """Print the time of calls that compute next to nothing."""
    for case in dict.fromkeys(map(overhead_case, records)):
        own = [r for r in records if overhead_case(r) == case]
        print_rows(console, [f"{case}, µs", "forward", "backward"], [overhead_row(r) for r in own])


def overhead_case(record: Record) -> str:
    """What a record of overhead is of."""
    case = record["case"]
    gradients = ", ".join(case["gradients"]) or "none"
    return f"{case['name']}, {case['prefix'] + case['local']} keys, gradients: {gradients}"


def overhead_row(record: Record) -> list[str]:
    """The peer and microseconds of a record of overhead."""
    if record["status"] != "ok":
        return [record["peer"], record["reason"]]
    times = [record[name] for name in ("forward", "backward") if record[name]]
    return [record["peer"], *(f"{1e6 * own['median']:.0f}" for own in times)]


def print_scaling(console: Console, axis: str, records: Sequence[Record]) -> None:
    """Print milliseconds of forward and backward along one axis, with the fitted exponents."""
    console.print(f"\nforward and backward in ms against {axis}", style="bold")
    sizes = sorted({record["value"] for record in records})
    rows = []
    for peer in dict.fromkeys(record["peer"] for record in records):
        points = dict(series(records, axis, peer, "total"))
        if points:
            exponent = fitted_exponent(list(points.items()))
            cells = [three_digits(1e3 * points[x]) if x in points else "-" for x in sizes]
            rows.append([peer, number(exponent, 2), *cells])
    print_rows(console, ["peer", "exponent", *(f"{size:g}" for size in sizes)], rows)


def print_compare(console: Console, records: Sequence[Record]) -> None:
    """Print both revisions of every case."""
    for case in {str(r["case"]): r["case"] for r in records}.values():
        own = [r for r in records if r["case"] == case]
        console.print(f"\n{describe_case(case)}", style="bold")
        rows = [[r["revision"], *kernel_row(r)[:9]] for r in own]
        print_rows(console, ["revision", *kernel_columns()[:9]], rows)


STEP_PHASES = (
    "tokenisation", "reading documents", "retriever forward", "reader",
    "retriever backward", "optimiser",
)  # fmt: skip


def step_columns() -> list[str]:
    """Column headers of :func:`step_row`."""
    return [
        "way", "status", "step s", "± %", "tokens/s", "faster", "peak MiB", "loss", "cosine",
    ]  # fmt: skip


def step_row(record: Record) -> list[str]:
    """The cells of one way."""
    if record["total"] is None:
        return [record["peer"], record["status"]]
    return [
        record["peer"],
        record["status"],
        three_digits(record["total"]["median"]),
        spread(record["total"]),
        number(record["tokens_per_second"], 0),
        number(record["ratio"], 1),
        number(scaled(record["peak_bytes"], 2**20), 0),
        number(record["loss"], 4),
        number(record["gradient_cosine"], 4),
    ]


def phase_row(record: Record) -> list[str]:
    """Seconds of a way by phase."""
    phases = record["phases"]
    cells = [three_digits(phases[p]["median"]) if p in phases else "-" for p in STEP_PHASES]
    return [record["peer"], *cells]


def print_steps(console: Console, records: Sequence[Record]) -> None:
    """Print the ways of one model."""
    first = records[0]
    models = number(scaled(max(r["models_bytes"] or 0 for r in records), 2**20), 0)
    console.print(
        f"\none training step: {first['model']}, {first['dtype']}, B {first['batch']}, "
        f"{first['documents']} documents of {first['document_tokens']} tokens, "
        f"{first['tokens']} tokens a step; process with models {models} MiB",
        style="bold",
    )
    print_rows(console, step_columns(), [step_row(r) for r in records])
    console.print("seconds of each phase", style="dim")
    print_rows(console, ["way", *STEP_PHASES], [phase_row(r) for r in records])
    for record in records:
        if record["reason"] is not None:
            console.print(f"  {record['peer']}: {record['reason']}", style="dim")


def teaching_columns() -> list[str]:
    """Column headers of :func:`teaching_row`."""
    return ["what", "status", "B x C", "s", "± %", "ms a pair", "times taught"]


def teaching_row(record: Record) -> list[str]:
    """The cells of one peer."""
    if record["total"] is None:
        return [record["peer"], record["status"]]
    return [
        record["peer"],
        record["status"],
        f"{record['batch']} x {record['documents']}",
        three_digits(record["total"]["median"]),
        spread(record["total"]),
        number(scaled(record["seconds_per_pair"], 1e-3), 2),
        number(record["ratio"], 2),
    ]


def print_teaching(console: Console, records: Sequence[Record]) -> None:
    """Print what teaching costs with one reader."""
    first = records[0]
    console.print(
        f"\nteaching: reader {first['model']}, {first['dtype']}, documents of "
        f"{first['document_tokens']} tokens",
        style="bold",
    )
    print_rows(console, teaching_columns(), [teaching_row(r) for r in records])
    for record in records:
        if record["reason"] is not None:
            console.print(f"  {record['peer']}: {record['reason']}", style="dim")


def milliseconds(quantiles: dict[str, float] | None) -> str:
    """A median in ms with three significant digits."""
    if quantiles is None:
        return "-"
    return three_digits(1e3 * quantiles["median"])


def spread(quantiles: dict[str, float]) -> str:
    """Half the interquartile range, in percent of the median."""
    half = (quantiles["upper"] - quantiles["lower"]) / 2
    return f"{100 * half / quantiles['median']:.0f}"


def three_digits(value: float) -> str:
    """A positive number with at least three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def number(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "-" if value is None else f"{100 * value:.0f} %"


def scaled(value: float | None, unit: float) -> float | None:
    """A value in another unit."""
    return None if value is None else value / unit
