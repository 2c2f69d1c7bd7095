"""The scaling suite: how cost and memory grow along one dimension at a time.

All sizes of one axis run in one race, so that a drift of the machine affects all alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cases import Case
from .ceilings import Ceilings
from .environment import provenance
from .kernel import Outcomes, Record, Settings, leave_out, race_together

# The operator, its plain implementation, and the floor: attention without scores.
PEERS = ("ours (cuda)", "ours (triton)", "ours (cpu)", "eager", "sdpa, no scores, expanded")


@dataclass(frozen=True)
class Axis:
    """One dimension.

    Attributes:
        name: in records and plots.
        label: of the plot's axis.
        sizes: the values along it.
        case: makes the case of a value.
    """

    name: str
    label: str
    sizes: Sequence[float]
    case: Callable[[float], Case]


def axes(base: Case, *, prefixes: Sequence[int], quick: bool = False) -> list[Axis]:
    """Prefix length, documents, batch and heads scored, each around ``base``."""
    few = slice(None, None, 2 if quick else 1)
    heads = [n for n in (1, 2, 3, 4, 6, 9, 12, 16, 24, 32) if n <= base.query_heads]

    def prefix(size: float) -> Case:
        return replace(base, prefix=int(size), covered=int(size))

    return [
        Axis("prefix", "prefix length (keys)", prefixes, prefix),
        Axis(
            "documents", "documents", [4, 8, 16, 32, 64, 128, 256][few],
            lambda size: replace(base, documents=int(size)),
        ),
        Axis(
            "batch", "batch (queries)", [1, 2, 4, 8, 16, 32][few],
            lambda size: replace(base, batch=int(size)),
        ),
        Axis(
            "heads", "heads scored", heads[few],
            lambda size: replace(base, scored=size / base.query_heads),
        ),
    ]  # fmt: skip


def default_axes(settings: Settings) -> list[Axis]:
    """The axes for a device, or few small ones for a quick run."""
    if settings.quick:
        base = Case("scaling", batch=2, rows=16, local=16, prefix=512, covered=512)
        return axes(base, prefixes=[512, 2048], quick=True)
    if settings.device.type == "cuda":
        base = Case(
            "scaling", batch=16, query_heads=32, key_heads=8, rows=128, local=128,
            prefix=4096, covered=4096, dtype="bfloat16",
        )  # fmt: skip
        return axes(base, prefixes=[2**i for i in range(10, 18)])
    return axes(Case("scaling"), prefixes=[2**i for i in range(9, 16)])


def run_scaling(
    wanted: Sequence[Axis], settings: Settings, show: Callable[[str, list[Record]], None]
) -> list[Record]:
    """Run every axis; ``show`` is called with its records when it is done."""
    deadline = time.monotonic() + settings.total_seconds
    environment = provenance(settings.device)
    records = []
    for axis in wanted:
        own = _run_axis(axis, settings, environment, time.monotonic() > deadline)
        show(axis.name, own)
        records += own
    return records


def _run_axis(
    axis: Axis, settings: Settings, environment: dict[str, Any], late: bool
) -> list[Record]:
    outcomes = {
        size: Outcomes(axis.case(size), settings, environment, Ceilings(), "scaling")
        for size in axis.sizes
    }
    if late:
        leave_out(list(outcomes.values()))
    else:
        race_together(list(outcomes.values()), set())
    return [
        {**record, "axis": axis.name, "value": size}
        for size, own in outcomes.items()
        for record in own.records()
    ]


def fitted_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through the logarithms; None for fewer than two points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs))
    variance = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / variance


def series(
    records: Sequence[Record], axis: str, peer: str, figure: str
) -> list[tuple[float, float]]:
    """The points of one line: ``figure`` is ``"total"`` (seconds) or ``"peak_bytes"``."""
    points = []
    for record in records:
        if record["axis"] != axis or record["peer"] != peer or record[figure] is None:
            continue
        value = record[figure]
        points.append((record["value"], value["median"] if figure == "total" else value))
    return sorted(points)
