"""The two pictures of the project's README, drawn from recorded results.

Each is drawn twice, for light and for dark pages; the README's ``<picture>`` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .cases import GRADIENTS

Record = dict[str, Any]

CASE = "laptop"
_OURS = "ours (cpu)"
# What a peer is called in the picture, fastest kind first; a peer that is not here is not drawn.
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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp.svg")
        figure.savefig(temporary, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return temporary.replace(path)
