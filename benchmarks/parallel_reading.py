"""``python -m benchmarks.parallel_reading``: tables and figures of ``docs/parallel-reading.md``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dream_kernels.files import write_text

from .parallel_model import (
    GPUS,
    H100S,
    READERS,
    STRATEGIES,
    Cost,
    Layout,
    Load,
    best,
    cost,
    crossing_tokens,
    gathered_candidates,
    layouts,
    long_documents,
    shape_of,
)

LOADS: dict[str, Callable[[int], Load]] = {
    "Gathered candidates": gathered_candidates,
    "Long documents": long_documents,
}
_HERE = Path(__file__).resolve().parent
_PAGE = _HERE.parent / "docs" / "parallel-reading.md"
_PLOTS = _HERE / "results" / "plots"
# The page holds the tables between lines of this form.
_BLOCK = "<!-- {name} -->\n{text}\n<!-- end of {name} -->"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def winners(load: Callable[[int], Load]) -> str:
    """For every reader and number of GPUs the fastest way that fits, and its seconds."""
    rows = []
    for name, model in READERS.items():
        cells = [f"**{name}**"]
        for gpus in GPUS:
            found = best(shape_of(model), load(gpus), gpus)
            cells.append("none fits" if found is None else _of_winner(*found))
        rows.append(cells)
    return _table(["reader", *map(str, GPUS)], rows)


def _of_winner(layout: Layout, counted: Cost) -> str:
    return f"{layout}<br>{_number(counted.seconds)} s"


def everything(load: Callable[[int], Load], model: str) -> str:
    """Every strategy of one reader: seconds, memory and bytes sent; the winner is bold."""
    shape, rows = shape_of(model), []
    for gpus in GPUS:
        winner = best(shape, load(gpus), gpus)
        cells = [str(gpus)]
        for strategy in STRATEGIES:
            found = best(shape, load(gpus), gpus, strategy)
            if found is None:
                cells.append("-")
                continue
            layout, counted = found
            text = f"{_number(counted.seconds)} s, {_number(counted.memory / 1e9)}, "
            text += _number(counted.sent / 1e9) + (f" ({layout.sizes})" if layout.sizes else "")
            cells.append(f"**{text}**" if winner and winner[0].strategy == strategy else text)
        rows.append(cells)
    return _table(["GPUs", *STRATEGIES], rows)


def crossings() -> str:
    """Where splitting the documents sends less than gathering them, and what fits."""
    rows = []
    for name, model in READERS.items():
        shape = shape_of(model)
        rows.append(
            [
                name,
                f"{shape.weight_bytes / 1e9:.1f}",
                f"{shape.key_value_bytes / 1024:.0f}",
                f"{crossing_tokens(shape, 1):.1f}",
                f"{crossing_tokens(shape, 16 * 108):,.0f}",
                *(_fitting_tokens(model, size) for size in (1, 8, 64)),
            ]
        )
    head = ["reader", "weights, GB", "KiB a token", "crossing, tokens a row", "for 16 queries"]
    return _table([*head, "fits 1 GPU", "fits 8", "fits 64"], rows)


def _fitting_tokens(model: str, ranks: int) -> str:
    """Document tokens that fit when ``ranks`` split them, for 16 queries; none of the weights."""
    shape = shape_of(model)
    empty = Load(16, ranks, 0)
    counted = cost(shape, empty, Layout(ranks, context=ranks))
    room = H100S.memory - counted.memory
    return "-" if room < 0 else f"{ranks * room / shape.key_value_bytes / 1e6:.2f}M"


def blocks() -> dict[str, str]:
    """The page's tables by name."""
    made = {"crossings": crossings()}
    for title, load in LOADS.items():
        made[f"winners: {title}"] = winners(load)
    for title, load in LOADS.items():
        for name, model in READERS.items():
            made[f"{title}, {name}"] = everything(load, model)
    return made


def fill(page: str) -> str:
    """The page with its tables renewed.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, text in blocks().items():
        block = _BLOCK.format(name=name, text=text)
        pattern = re.escape(f"<!-- {name} -->") + ".*?" + re.escape(f"<!-- end of {name} -->")
        literally = block.replace("\\", r"\\")
        page, found = re.subn(pattern, literally, page, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the page must have one place for {name!r}, got {found}")
    return page


_STYLES = {
    "replicated": ("0.65", ":", "o"),
    "gathered": ("black", "-", "o"),
    "sharded": ("tab:green", "--", "s"),
    "tensor": ("tab:blue", "-", "^"),
    "context": ("tab:red", "-", "D"),
    "context, sharded": ("tab:orange", "--", "D"),
    "tensor, context": ("tab:purple", ":", "v"),
}


Points = dict[str, list[tuple[int, float]]]


def relative_times(model: str, load: Callable[[int], Load]) -> Points:
    """Seconds of every strategy, as far as it fits, over those of the fastest."""
    shape = shape_of(model)
    points: Points = {strategy: [] for strategy in STRATEGIES}
    for gpus in GPUS:
        found = {s: best(shape, load(gpus), gpus, s) for s in STRATEGIES}
        seconds = {s: pair[1].seconds for s, pair in found.items() if pair is not None}
        for strategy, own in seconds.items():
            points[strategy].append((gpus, own / min(seconds.values())))
    return points


def least(model: str, load: Callable[[int], Load], value: Callable[[Cost], float]) -> Points:
    """The least value that a strategy can reach, whether it fits or not."""
    shape = shape_of(model)
    points: Points = {strategy: [] for strategy in STRATEGIES}
    for gpus in GPUS:
        reached: dict[str, float] = {}
        for layout in layouts(shape, load(gpus), gpus):
            own = value(cost(shape, load(gpus), layout))
            reached[layout.strategy] = min(own, reached.get(layout.strategy, own))
        for strategy, own in reached.items():
            points[strategy].append((gpus, own))
    return points


def _draw(axes: Any, points: Points) -> None:
    for strategy, (color, line, marker) in _STYLES.items():
        own = points[strategy]
        axes.plot(
            [x for x, _ in own], [y for _, y in own], line, color=color, marker=marker, ms=3.5,
            lw=1.2, label=strategy,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, [str(n) for n in GPUS], fontsize=7)
    axes.set_xlim(0.8, 640)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3, lw=0.4)


def draw_times() -> Any:
    """Relative time of a step, every reader, both loads; only what fits."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        2, len(READERS), figsize=(14.5, 6.0), layout="constrained", sharey="row"
    )
    for line, (title, load) in zip(grid, LOADS.items()):
        for axes, (name, model) in zip(line, READERS.items()):
            _draw(axes, relative_times(model, load))
            axes.set_title(f"{title}, {name}", fontsize=9)
            axes.set_ylim(0.93, 8)
            axes.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
            axes.minorticks_off()
        line[0].set_ylabel("time over that of the fastest", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("GPUs", fontsize=8)
    _legend(figure, grid)
    figure.suptitle("Time of a step, where it fits in memory: computed, not measured", fontsize=11)
    return figure


def draw_sizes() -> Any:
    """Least memory and least bytes of a rank, 8B and 70B, whether they fit or not."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(14.5, 6.0), layout="constrained", sharey="row")
    columns = [(t, load, name) for t, load in LOADS.items() for name in ("8B", "70B")]
    for (title, load, name), above, below in zip(columns, *grid):
        _draw(above, least(READERS[name], load, lambda c: c.memory / 1e9))
        above.axhline(H100S.memory / 1e9, color="0.3", lw=0.8)
        above.text(0.9, 1.08 * H100S.memory / 1e9, "72 GB", fontsize=7, color="0.3")
        above.set_title(f"{title}, {name}", fontsize=9)
        _draw(below, least(READERS[name], load, lambda c: c.sent / 1e9))
        below.set_ylim(0.05, 3000)
        below.set_xlabel("GPUs", fontsize=8)
    grid[0][0].set_ylabel("GB held by a rank, at least", fontsize=8)
    grid[1][0].set_ylabel("GB sent by a rank, at least", fontsize=8)
    _legend(figure, grid)
    figure.suptitle(
        "The least memory and the least communication of each strategy: computed", fontsize=11
    )
    return figure


def _legend(figure: Any, grid: Any) -> None:
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; with ``--write`` renew those of the page, and the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel_reading", description=main.__doc__
    )
    parser.add_argument("--write", action="store_true", help="renew the page and its figures")
    if not parser.parse_args(arguments).write:
        for name, text in blocks().items():
            print(f"{name}\n\n{text}\n")
        return
    from .plots import save

    write_text(_PAGE, fill(_PAGE.read_text()))
    save(draw_times(), _PLOTS / "parallel-reading-time.png")
    save(draw_sizes(), _PLOTS / "parallel-reading-size.png")


if __name__ == "__main__":
    main()
