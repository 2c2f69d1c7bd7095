"""Plots: training curves, comparisons of runs, and the map of the reader's heads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dream_kernels import HeadFile
from dream_kernels.files import open_whole
from dream_training.history import History

# Title and unit of the map by the criterion that a head file names.
_HEAD_SCORES = {
    "qr_mass": ("QR score", "attention to the gold document\nabove the null query"),
    "qr_ndcg": ("nDCG@10 of the ranking", "nDCG@10 of the pool as the head ranks it"),
    "loss_gradient": (
        "Drop of the loss",
        "nats per target token when the head\nreads what the loss prefers",
    ),
}

# Marker, colour and place within the cell of each criterion.
_MARKS = (
    ("o", "#1b4f8a", -0.22, 0.22),
    ("^", "#d08a3a", 0.22, 0.22),
    ("D", "#2f8f5b", -0.22, -0.22),
    ("v", "#8a3a6f", 0.22, -0.22),
)


def plot_heads(head_file: HeadFile, path: str | os.PathLike[str]) -> Path:
    """Draw the score of every head as a layer x head map, the chosen ones outlined.

    Raises:
        ValueError: the file has no scores.
    """
    if not head_file.scores:
        raise ValueError("the head file has no scores to draw")
    layers = 1 + max(layer for layer, _ in head_file.scores)
    heads = 1 + max(head for _, head in head_file.scores)
    grid = np.full((heads, layers), np.nan)
    for (layer, head), score in head_file.scores.items():
        grid[head, layer] = score
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    width = min(14.0, 3.0 + 0.32 * layers)
    figure, axes = plt.subplots(figsize=(width, 1.8 + 0.28 * heads), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit, origin="lower")
    for rank, (layer, head) in enumerate(head_file.heads[: head_file.chosen or 0]):
        axes.add_patch(
            plt.Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, lw=1.5, ec="black")
        )
        if rank < 3:
            axes.text(layer, head, str(rank + 1), ha="center", va="center", fontsize=8)
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.set_xticks(range(0, layers, max(1, layers // 15)))
    axes.set_yticks(range(0, heads, max(1, heads // 16)))
    title, meaning = _HEAD_SCORES.get(head_file.provenance.get("criterion", ""), ("Score", "score"))
    outlined = f", the best {head_file.chosen} outlined" if head_file.chosen else ""
    axes.set_title(f"{title} of each head{outlined}")
    figure.colorbar(image, ax=axes, label=meaning)
    return _save(figure, path)


def plot_head_choices(
    choices: Mapping[str, Sequence[tuple[int, int]]],
    draws: Sequence[Sequence[tuple[int, int]]],
    shape: tuple[int, int],
    path: str | os.PathLike[str],
) -> Path:
    """Draw which criterion chose which heads: a marker for each, a shade for random draws.

    Args:
        choices: ``(layer, head)`` pairs by the name of the criterion; at most four.
        draws: the same for random draws, without names.
        shape: (layers, heads) of the reader.
        path: PNG file.

    Raises:
        ValueError: there are more than four criteria.
    """
    if len(choices) > len(_MARKS):
        raise ValueError(f"at most {len(_MARKS)} criteria can be drawn, got {len(choices)}")
    layers, heads = shape
    width = min(14.0, 3.0 + 0.4 * layers)
    figure, axes = plt.subplots(figsize=(width, 2.2 + 0.36 * heads), layout="constrained")
    shade = np.zeros((heads, layers))
    for drawn in draws:
        for layer, head in drawn:
            shade[head, layer] += 1 / len(draws)
    axes.imshow(shade, aspect="auto", cmap="Greys", vmin=0, vmax=2, origin="lower")
    for (name, chosen), (mark, color, dx, dy) in zip(choices.items(), _MARKS):
        x, y = np.array(chosen, dtype=float).reshape(-1, 2).T
        axes.scatter(x + dx, y + dy, marker=mark, s=26, color=color, label=name)
    if draws:
        label = f"chosen by random draws (of {len(draws)})"
        axes.scatter([], [], marker="s", s=60, color="0.75", label=label)
    axes.set_xticks(np.arange(-0.5, layers), minor=True)
    axes.set_yticks(np.arange(-0.5, heads), minor=True)
    axes.grid(which="minor", color="0.85", lw=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(0, layers, max(1, layers // 15)))
    axes.set_yticks(range(0, heads, max(1, heads // 16)))
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    most = max(map(len, choices.values()), default=0)
    axes.set_title(f"The best {most} heads by each criterion")
    figure.legend(loc="outside lower center", ncols=len(choices) + 1, fontsize=8, frameon=False)
    return _save(figure, path)


def plot_curve(
    history: History,
    path: str | os.PathLike[str],
    reference: dict[str, float] | None = None,
    title: str = "What the retriever learned",
) -> Path:
    """Draw nDCG@10 and the loss over the steps.

    Args:
        history: of the run.
        path: PNG file.
        reference: nDCG@10 of other retrievers by name, drawn as horizontal lines.
        title: of the picture.
    """
    return plot_curves({title: history}, path, reference)


def plot_curves(
    histories: Mapping[str, History],
    path: str | os.PathLike[str],
    reference: dict[str, float] | None = None,
) -> Path:
    """Draw nDCG@10 and the loss over the steps of several runs on the same queries, side by side.

    Args:
        histories: of the runs, by the title of their panel.
        path: PNG file.
        reference: nDCG@10 of other retrievers by name, drawn as horizontal lines.
    """
    count = len(histories)
    figure, panels = plt.subplots(
        1,
        count,
        figsize=(7.0 if count == 1 else 5.2 * count, 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    lines: dict[str, Any] = {}  # by label, so that the legend has each once
    for place, (axes, (title, history)) in enumerate(zip(panels[0], histories.items())):
        drawn = _draw_scores(axes, history, reference or {})
        drawn += _draw_loss(axes, history, place == count - 1)
        lines |= {line.get_label(): line for line in drawn}
        axes.set_title(title, fontsize=12 if count == 1 else 11)
    highest = [max(line.get_ydata()) for label, line in lines.items() if "(left)" in label]
    highest += [e["ndcg_at_10"] for history in histories.values() for e in history.evaluations]
    panels[0][0].set_ylim(0, 1.15 * max([0.1, *highest]))
    panels[0][0].set_ylabel("nDCG@10")
    figure.legend(
        handles=list(lines.values()), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return _save(figure, path)


def _draw_scores(axes: Any, history: History, reference: dict[str, float]) -> list[Any]:
    """nDCG@10 over the steps, and that of other retrievers."""
    lines: list[Any] = []
    if history.evaluations:
        steps = [e["step"] for e in history.evaluations]
        values = [e["ndcg_at_10"] for e in history.evaluations]
        lines += axes.plot(steps, values, "o-", color="#1b4f8a", lw=2, label="nDCG@10 (left)")
        for step, value in zip(steps, values):
            axes.annotate(
                f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 7),
                ha="center", fontsize=8,
            )  # fmt: skip
    for (name, value), style in zip(reference.items(), (":", "-.", "--")):
        lines.append(axes.axhline(value, color="0.35", ls=style, lw=1.2, label=f"{name} (left)"))
    axes.set_xlabel("training step")
    axes.grid(alpha=0.25)
    return lines


def _draw_loss(axes: Any, history: History, labelled: bool) -> list[Any]:
    """The loss over the steps, on an axis of its own at the right."""
    losses = [(s["step"], s["loss"]) for s in history.steps if "loss" in s]
    if not losses:
        return []
    right = axes.twinx()
    x, y = np.array(losses).T
    right.plot(x, y, color="#d08a3a", lw=0.8, alpha=0.45)
    window = min(len(y), 10)
    smooth = np.convolve(y, np.ones(window) / window, mode="valid")
    if labelled:
        right.set_ylabel("loss of the objective, nats")
    return right.plot(
        x[window - 1 :], smooth, color="#d08a3a", lw=2, ls="--",
        label=f"loss, mean of {window} steps (right)",
    )  # fmt: skip


def plot_comparison(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    untrained: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
) -> Path:
    """Draw nDCG@10 of every run and seed, one panel for each data set; the bar is the mean.

    Args:
        scores: by run and data set, one figure per seed.
        untrained: by data set, the figures before training.
        path: PNG file.

    Raises:
        ValueError: there is no result to draw.
    """
    data_sets = list(dict.fromkeys(data for run in scores.values() for data in run))
    if not data_sets:
        raise ValueError("scores must hold at least one result, got none")
    figure, panels = plt.subplots(
        1,
        len(data_sets),
        figsize=(2.2 + 3.6 * len(data_sets), 1.4 + 0.42 * len(scores)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for data, axes in zip(data_sets, panels[0]):
        for place, run in enumerate(scores.values()):
            values = run.get(data, [])
            if values:
                mean = float(np.mean(values))
                axes.barh(place, mean, height=0.55, color="#b9cbe0", edgecolor="#1b4f8a")
                axes.plot(values, [place] * len(values), "o", color="#1b4f8a", ms=4)
                axes.annotate(
                    f"{mean:.3f}", (max(values), place), textcoords="offset points",
                    xytext=(6, 0), va="center", fontsize=8,
                )  # fmt: skip
        axes.axvline(float(np.mean(untrained[data])), color="0.35", ls=":", lw=1.2)
        axes.set_title(data, fontsize=10)
        axes.set_xlabel("nDCG@10 (dotted: untrained)")
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.25)
    panels[0][0].set_yticks(range(len(scores)), list(scores))
    panels[0][0].invert_yaxis()
    return _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    with open_whole(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
    return Path(path)
