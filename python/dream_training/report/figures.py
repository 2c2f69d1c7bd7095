"""Figures of a report as inline SVG, whose colours are those of the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from dream_kernels import HeadFile
from dream_training.report.run_folder import Run

# Placeholder colours, which are replaced by CSS variables of the page, so that one figure serves
# light and dark pages.
_INK, _FAINT = "#010203", "#010204"
SERIES = 6
_SERIES = [f"#0102{0x10 + i:02x}" for i in range(SERIES)]
_DASHES = ("-", "--", ":")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "image.interpolation": "nearest",
    "savefig.transparent": True,
}
_WINDOW = 10


def series_style(index: int) -> tuple[str, str]:
    """CSS colour and dash pattern of the run with this index."""
    return f"var(--series-{index % SERIES})", _DASHES[index // SERIES % len(_DASHES)]


def curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Draw what was measured over the steps, all runs in one figure for each quantity.

    Returns:
        ``(title, SVG)`` of each quantity that at least one run has.
    """
    figures = []
    for title, key, smooth in (
        ("Loss", "loss", True),
        ("Entropy of the weights, nats", "entropy", True),
        ("Weight on the relevant document", "weight_on_positive", True),
        ("Tokens per second", "tokens_per_second", True),
    ):
        points = [_points(run, key) for run in runs]
        if not any(len(x) for x, _ in points):
            continue
        with plt.rc_context(_STYLE):
            figure, axes = _axes(title)
            for i, (x, y) in enumerate(points):
                if len(x):
                    _line(axes, x, y, i, smooth)
            if key == "entropy":
                _maximum(axes, runs)
            if key == "tokens_per_second":
                axes.set_ylim(bottom=0)
        figures.append((title, _svg(figure, key)))
    if any(run.history.evaluations for run in runs):
        title = "nDCG@10"
        with plt.rc_context(_STYLE):
            figure, axes = _axes(title)
            for i, run in enumerate(runs):
                points_of_run = [(e["step"], e["ndcg_at_10"]) for e in run.history.evaluations]
                if points_of_run:
                    x, y = np.array(points_of_run).T
                    style = _DASHES[i // SERIES % len(_DASHES)]
                    axes.plot(x, y, style, marker="o", ms=4, lw=1.8, color=_SERIES[i % SERIES])
            axes.set_ylim(bottom=0)
        figures.insert(1, (title, _svg(figure, "ndcg")))
    return figures


def head_map(heads: HeadFile, top_k: int, name: str) -> str:
    """Draw the score of every head, those that received the document scores outlined.

    Without scores in the file, the chosen heads alone.
    """
    pairs = list(heads.scores) or heads.heads
    layers, count = (1 + max(pair[axis] for pair in pairs) for axis in (0, 1))
    grid = np.full((count, layers), np.nan)
    for (layer, head), score in heads.scores.items():
        grid[head, layer] = score
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            figsize=(min(9.0, max(5.2, 2.6 + 0.2 * layers)), 1.3 + 0.16 * count),
            layout="constrained",
        )
        if heads.scores:
            limit = float(np.nanmax(np.abs(grid))) or 1.0
            image = axes.imshow(
                grid, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit, origin="lower"
            )
            bar = figure.colorbar(image, ax=axes, pad=0.01)
            bar.outline.set_visible(False)
            bar.set_label("score")
        else:
            axes.set_xlim(-0.5, layers - 0.5)
            axes.set_ylim(-0.5, count - 0.5)
        for layer, head in heads.heads[:top_k]:
            axes.add_patch(
                plt.Rectangle(
                    (layer - 0.5, head - 0.5), 1, 1, fill=not heads.scores, lw=1.4, ec="#d6006c",
                    fc="#d6006c",
                )
            )  # fmt: skip
        axes.set_xlabel("layer")
        axes.set_ylabel("head")
        axes.set_xticks(range(0, layers, max(1, layers // 12)))
        axes.set_yticks(range(0, count, max(1, count // 8)))
    return _svg(figure, name)


def _axes(title: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(5.2, 2.9), layout="constrained")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    return figure, axes


def _line(axes: plt.Axes, x: np.ndarray, y: np.ndarray, index: int, smooth: bool) -> None:
    color, style = _SERIES[index % SERIES], _DASHES[index // SERIES % len(_DASHES)]
    window = min(_WINDOW, max(1, len(y) // 3))
    if smooth and window > 1:
        axes.plot(x, y, style, color=color, lw=0.7, alpha=0.35)
        mean = np.convolve(y, np.ones(window) / window, mode="valid")
        axes.plot(x[window - 1 :], mean, style, color=color, lw=1.8)
    else:
        axes.plot(x, y, style, color=color, lw=1.8, marker="o" if len(x) == 1 else None)


def _maximum(axes: plt.Axes, runs: Sequence[Run]) -> None:
    """The entropy of uniform weights, once for each size of pool."""
    steps = [s for run in runs for s in run.history.steps if "max_entropy" in s]
    drawn = sorted({round(s["max_entropy"], 2) for s in steps})
    # Pools of varying size have many; their range says enough.
    for value in {drawn[0], drawn[-1]} if drawn else ():
        axes.axhline(value, color=_INK, lw=1, ls=(0, (1, 2)))
        axes.annotate(
            f"uniform {value:.2f}", (0, value), xytext=(3, -9), textcoords="offset points",
            xycoords=("axes fraction", "data"), fontsize=8,
        )  # fmt: skip
    axes.set_ylim(bottom=0)


def _points(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    def value(step: dict[str, float]) -> float | None:
        if key == "tokens_per_second":
            return step["tokens"] / step["seconds"] if "tokens" in step else None
        return step.get(key)

    pairs = [(s["step"], value(s)) for s in run.history.steps]
    x, y = np.array([pair for pair in pairs if pair[1] is not None]).reshape(-1, 2).T
    return x, y


def _svg(figure: plt.Figure, name: str) -> str:
    """Render as an ``<svg>`` element that fills its place and has no name in common with others."""
    buffer = io.StringIO()
    # The salt makes the ids of clip paths differ between the figures of one page.
    with plt.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Groups are named axes_1, line2d_3, ...: names that every figure has and nothing refers to.
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    head, rest = svg.split(">", 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
    for i, color in enumerate(_SERIES):
        svg = svg.replace(color, f"var(--series-{i})")
    for color, variable in ((_INK, "--ink"), (_FAINT, "--line")):
        svg = svg.replace(color, f"var({variable})")
    return svg
