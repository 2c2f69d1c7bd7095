"""The two pictures of the project's README, drawn from recorded results.

Each is drawn twice, for light and for dark pages; the README's ``<picture>`` chooses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from dream_kernels.files import open_whole, write_text
from dream_training.json_file import read_json

from .cases import GRADIENTS
from .environment import device_slug, provenance
from .records import read

Record = dict[str, Any]

CASE = "laptop"
_OURS = "ours (cpu)"
# Names of the peers in the picture, fastest first; others are not drawn.
_PEERS = {
    _OURS: "dream-kernels",
    "sdpa, no scores, grouped": "PyTorch SDPA (GQA), no scores",
    "sdpa, no scores, expanded": "PyTorch SDPA, no scores",
    "sdpa, extra channel": "SDPA, scores in an extra channel",
    "sdpa, dense mask": "SDPA, scores as a dense mask",
    "eager": "plain PyTorch, with scores",
}


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page; the background is the page's own."""

    name: str
    text: str
    grid: str
    ours: str
    other: str
    second: str


THEMES = (
    Theme("light", "#1f2328", "#d0d7de", "#0969da", "#afb8c1", "#bc4c00"),
    Theme("dark", "#e6edf3", "#3d444d", "#4493f8", "#656c76", "#f0883e"),
)


def draw_pictures(results: Path, images: Path, device: str | None) -> list[Path]:
    """Draw all pictures from the records in ``results``.

    Args:
        results: folder of the records.
        images: folder of the pictures.
        device: whose records; None takes the newest of each kind.

    Raises:
        ValueError: there is no record of a kind, or none of that device.
    """
    demos = [read_json(path) for path in sorted(results.glob("demo-*.json"))]
    if device is not None:
        demos = [demo for demo in demos if demo["environment"]["device"] == device]
    if not demos:
        raise ValueError(f"{results} has no record of a demo; record one: pictures --demo FOLDER")
    newest = max(demos, key=lambda demo: demo["environment"]["date"])
    rows = speed_rows(read(results), device)
    return [
        *draw_in_themes("demo", images, lambda theme: draw_demo(newest, theme)),
        *draw_in_themes("speed", images, lambda theme: draw_speed(rows, theme)),
    ]


def draw_in_themes(name: str, folder: Path, draw: Callable[[Theme], Any]) -> list[Path]:
    """Draw ``folder/name-light.svg`` and ``folder/name-dark.svg``."""
    return [_save(draw, theme, folder / f"{name}-{theme.name}.svg") for theme in THEMES]


def speed_rows(records: Sequence[Record], device: str | None) -> dict[str, dict[str, float]]:
    """Times relative to ours, by dtype and peer, of the shape of a laptop's training step.

    Args:
        records: of the kernel suite.
        device: whose records; None takes the newest.

    Raises:
        ValueError: there is no such record.
    """
    own = [
        r
        for r in records
        if r["suite"] == "kernel" and r["ratio"] is not None and r["case"]["name"] == CASE
        and tuple(r["case"]["gradients"]) == GRADIENTS and r["peer"] in _PEERS
    ]  # fmt: skip
    devices = {r["environment"]["device"]: r["environment"]["date"] for r in own}
    if not devices or device not in {None, *devices}:
        known = ", ".join(devices) or "none"
        raise ValueError(f"no record of case {CASE!r} on device {device!r}; recorded: {known}")
    device = device or max(devices, key=lambda name: devices[name])
    rows: dict[str, dict[str, float]] = {}
    for record in own:
        if record["environment"]["device"] == device:
            rows.setdefault(record["case"]["dtype"], {})[record["peer"]] = record["ratio"]
    return rows


def draw_speed(rows: dict[str, dict[str, float]], theme: Theme) -> Any:
    """Bars of time relative to ours, a panel for each dtype."""
    figure, panels = plt.subplots(
        1, len(rows), figsize=(4.4 + 3.0 * len(rows), 2.7), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    peers = [peer for peer in _PEERS if any(peer in ratios for ratios in rows.values())]
    for axes, (dtype, ratios) in zip(panels[0], rows.items()):
        for place, peer in enumerate(peers):
            if peer not in ratios:
                continue
            color = theme.ours if peer == _OURS else theme.other
            axes.barh(place, ratios[peer], color=color, height=0.62)
            axes.annotate(
                f"{ratios[peer]:.1f}", (ratios[peer], place), textcoords="offset points",
                xytext=(4, 0), va="center",
            )  # fmt: skip
        axes.set_title(dtype)
        axes.set_xlabel("time, forward and backward (ours = 1)")
        axes.margins(x=0.12)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    panels[0][0].set_yticks(range(len(peers)), [_PEERS[peer] for peer in peers])
    panels[0][0].invert_yaxis()
    return figure


def record_demo(demo: Path, results: Path) -> Path:
    """Keep the figures of a ``dream demo`` that was run on this machine.

    Args:
        demo: the folder that the demo wrote.
        results: of the records; ``demo-<device>.json`` is replaced there.

    Raises:
        FileNotFoundError: a file of the demo is missing.
        ValueError: one of its files is not valid.
    """
    metrics = read_json(demo / "metrics.json")
    curves = {"a retriever from nothing": _curve(demo / "history.json")}
    if "adapted" in metrics:
        name = f"{metrics['adapted']['retriever']}, adapted"
        curves[name] = _curve(demo / "adapted" / "history.json")
    environment = provenance(torch.device("cpu"))
    record = {"environment": environment, "metrics": metrics, "curves": curves}
    path = results / f"demo-{device_slug(environment['device'])}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path


def _curve(history: Path) -> list[list[float]]:
    return [[e["step"], e["ndcg_at_10"]] for e in read_json(history)["evaluations"]]


def draw_demo(record: Mapping[str, Any], theme: Theme) -> Any:
    """nDCG@10 over the training steps of each part of the demo, beside BM25."""
    figure, axes = plt.subplots(figsize=(7.4, 2.9), layout="constrained")
    colors = (theme.second, theme.ours)
    for (name, points), color in zip(record["curves"].items(), colors):
        steps, values = zip(*points)
        axes.plot(steps, values, "o-", color=color, lw=2, ms=4)
        axes.annotate(
            f"{name}: {values[0]:.3f} → {values[-1]:.3f}", (steps[-1], values[-1]), color=color,
            textcoords="offset points", xytext=(8, 0), va="center",
        )  # fmt: skip
    bm25 = record["metrics"]["bm25"]["ndcg_at_10"]
    axes.axhline(bm25, color=theme.text, ls=":", lw=1.2)
    axes.annotate(
        f"BM25: {bm25:.3f}", (0, bm25), textcoords="offset points", xytext=(4, -11), va="center"
    )
    last = max(points[-1][0] for points in record["curves"].values())
    axes.set_xlim(-0.02 * last, 1.75 * last)
    axes.set_ylim(0, None)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.set_xlabel("training step, no labels")
    axes.set_ylabel("nDCG@10")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _save(draw: Callable[[Theme], Any], theme: Theme, path: Path) -> Path:
    colors = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    settings: Any = {
        **dict.fromkeys(colors, theme.text),
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.facecolor": "none",
        "grid.color": theme.grid,
        "svg.hashsalt": path.stem,  # equal records give equal files
    }
    with plt.rc_context(settings):
        figure = draw(theme)
        with open_whole(path, binary=True) as file:
            figure.savefig(
                file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        plt.close(figure)
    return path
