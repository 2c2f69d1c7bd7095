"""Plots of the records, legible in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dream_kernels.files import open_whole

from .cases import GRADIENTS
from .environment import device_slug
from .scaling import fitted_exponent, series
from .tables import STEP_PHASES, three_digits

Record = dict[str, Any]

_AXES = {
    "prefix": "prefix length (keys)",
    "documents": "documents",
    "batch": "batch (queries)",
    "heads": "heads scored",
}
# Line style, marker and grey tell peers apart without colour.
_LINES = (("-", "o", "0.0"), ("--", "s", "0.35"), (":", "^", "0.5"), ("-.", "D", "0.2"))
_GREYS = ("0.95", "0.80", "0.55", "0.30", "0.55", "1.00")
_HATCHES = ("...", "", "//", "", "\\\\", "xxx")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw all plots that the records allow; returns the PNG files."""
    paths = []
    for device in dict.fromkeys(r["environment"]["device"] for r in records):
        own = [r for r in records if r["environment"]["device"] == device and r["status"] == "ok"]
        slug = device_slug(device)
        kernel = [r for r in own if r["suite"] in ("kernel", "acceptance")]
        if kernel:
            paths.append(save(draw_kernel(kernel, device), folder / f"kernel-{slug}.png"))
        scaling = [r for r in own if r["suite"] == "scaling"]
        if scaling:
            paths.append(save(draw_scaling(scaling, device), folder / f"scaling-{slug}.png"))
        steps = [r for r in own if r["suite"] == "step" and r["total"] is not None]
        for model in dict.fromkeys(r["model"] for r in steps):
            figure = draw_steps([r for r in steps if r["model"] == model], device)
            paths.append(save(figure, folder / f"step-{model}-{slug}.png"))
    return paths


def draw_kernel(records: Sequence[Record], device: str) -> Any:
    """Forward and backward of every peer, one panel for each case with all gradients."""
    panels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        complete = tuple(record["case"]["gradients"]) == GRADIENTS and record["total"] is not None
        if complete:
            case = record["case"]
            panels.setdefault((case["name"], case["dtype"]), []).append(record)
    if not panels:
        panels = {("all cases", ""): [r for r in records if r["total"] is not None]}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 0.7 + 2.6 * lines), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, ((name, dtype), rows) in zip(grid.flat, panels.items()):
        _draw_bars(axes, rows)
        axes.set_title(f"{name}, {dtype}", fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"One call, forward and backward, {device}", fontsize=11)
    return figure


def _draw_bars(axes: Any, rows: Sequence[Record]) -> None:
    rows = sorted(rows, key=lambda r: -r["total"]["median"])
    names = [f"{r['peer']}\n({r['computes']})" for r in rows]
    forward = [1e3 * r["forward"]["median"] for r in rows]
    backward = [1e3 * r["backward"]["median"] if r["backward"] else 0.0 for r in rows]
    axes.barh(names, forward, color="0.75", edgecolor="black", lw=0.6, label="forward")
    axes.barh(
        names, backward, left=forward, color="0.35", edgecolor="black", lw=0.6, label="backward"
    )
    longest = max(f + b for f, b in zip(forward, backward))
    for place, record in enumerate(rows):
        ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f}"
        total = forward[place] + backward[place]
        axes.text(total + 0.01 * longest, place, ratio, va="center", fontsize=8)
    axes.set_xlim(0, 1.14 * longest)
    axes.set_xlabel("milliseconds; beside each bar, its length relative to ours", fontsize=8)
    axes.tick_params(labelsize=7)


def draw_scaling(records: Sequence[Record], device: str) -> Any:
    """Time above, memory below, one column for each axis; the legend names fitted exponents."""
    axes_names = [name for name in _AXES if any(r["axis"] == name for r in records)]
    figures = ["total"]
    if any(r["peak_bytes"] for r in records):
        figures.append("peak_bytes")
    figure, grid = plt.subplots(
        len(figures), len(axes_names), figsize=(4.1 * len(axes_names), 3.5 * len(figures)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    peers = list(dict.fromkeys(r["peer"] for r in records))
    for line, what in enumerate(figures):
        for column, name in enumerate(axes_names):
            axes = grid[line][column]
            for peer, (style, marker, grey) in zip(peers, _LINES):
                points = series(records, name, peer, what)
                if not points:
                    continue
                scale = 1e3 if what == "total" else 2**-20
                exponent = fitted_exponent(points)
                label = peer if exponent is None else f"{peer}: {exponent:+.2f}"
                axes.plot(
                    [x for x, _ in points], [scale * max(y, 1e-9) for _, y in points], style,
                    marker=marker, ms=4, color=grey, label=label,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axes.set_xlabel(_AXES[name])
            axes.grid(alpha=0.3, which="both", lw=0.4)
            axes.legend(
                fontsize=7, title="fitted exponent", title_fontsize=7, frameon=False,
                loc="upper center", bbox_to_anchor=(0.5, -0.16),
            )  # fmt: skip
        unit = "forward + backward (ms)" if what == "total" else "memory beyond in/out (MiB)"
        grid[line][0].set_ylabel(unit)
    figure.suptitle(f"How cost grows, {device}", fontsize=11)
    return figure


def draw_steps(records: Sequence[Record], device: str) -> Any:
    """Time of a step by phase: all ways, and the fastest ones enlarged."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 3.9), layout="constrained")
    fast = sorted(records, key=lambda r: r["total"]["median"])[: max(1, len(records) - 2)]
    _draw_phases(left, records)
    _draw_phases(right, [r for r in records if r in fast])
    left.set_title("all ways", fontsize=10)
    right.set_title("the fast ones", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    first = records[0]
    figure.suptitle(
        f"One training step, {first['model']} in {first['dtype']}, {first['batch']} queries, "
        f"{first['documents']} documents of {first['document_tokens']} tokens, {device}",
        fontsize=11,
    )
    return figure


def _draw_phases(axes: Any, records: Sequence[Record]) -> None:
    rows = list(reversed(records))
    names = [r["peer"].replace(", ", ",\n") for r in rows]
    left = [0.0] * len(rows)
    for phase, grey, hatch in zip(STEP_PHASES, _GREYS, _HATCHES):
        widths = [r["phases"][phase]["median"] if phase in r["phases"] else 0.0 for r in rows]
        if not any(widths):
            continue
        axes.barh(
            names, widths, left=left, color=grey, hatch=hatch, edgecolor="black", lw=0.6,
            label=phase,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths)]
    for place, record in enumerate(rows):
        text = f"{three_digits(record['total']['median'])} s"
        if record["ratio"] is not None:
            text += f", {record['ratio']:.1f} times faster"
        axes.text(left[place] + 0.01 * max(left), place, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.45 * max(left))
    axes.set_xlabel("seconds a step")
    axes.tick_params(labelsize=8)


def save(figure: Any, path: Path) -> Path:
    with open_whole(path, binary=True) as file:
        # Without a date and a version in the file, equal records give equal files.
        figure.savefig(file, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
    return path
