"""Evaluations as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from dream_training.console import make_table, print_paths, short_names
from dream_training.evaluation.results import DROPPED, Evaluation

# Of names longer than this, a table may show the beginning alone.
_LONG = 16


def print_table(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """Print one line for each model on each task, and each model's mean over its tasks."""
    table = make_table("task", "model", "nDCG@10", "recall@10", "queries", "documents", texts=2)
    tasks = list(dict.fromkeys(e.task for e in evaluations))
    models = list(dict.fromkeys(e.model for e in evaluations))
    shown = short_names([*tasks, *models])
    for task in tasks:
        for e in evaluations:
            if e.task == task:
                table.add_row(
                    shown[task], shown[e.model], f"{e.ndcg_at_10:.4f}", f"{e.recall_at_10:.4f}",
                    f"{len(e.query_ndcg_at_10):,}", f"{e.documents:,}",
                )  # fmt: skip
        table.add_section()
    for model in models:
        own = [e for e in evaluations if e.model == model]
        if len(tasks) > 1 and len(own) == len(tasks):
            ndcg = sum(e.ndcg_at_10 for e in own) / len(own)
            recall = sum(e.recall_at_10 for e in own) / len(own)
            table.add_row(
                f"mean of {len(own)}", shown[model], f"{ndcg:.4f}", f"{recall:.4f}", "", ""
            )
    console.print(table)
    whole = console.measure(table).maximum <= console.width
    legend = {name: path for path, name in shown.items() if name != path}
    cut = [n for n in shown.values() if not whole and len(n) > _LONG and n not in legend]
    if legend or cut:
        console.print()
        print_paths(console, {**legend, **dict.fromkeys(cut, "")})


def print_left_out(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """Print for how many queries of each task the document of the same id was not ranked."""
    for task in dict.fromkeys(e.task for e in evaluations):
        dropped = max(e.settings.get(DROPPED, 0) for e in evaluations if e.task == task)
        if dropped:
            console.print(
                f"{task}: for {dropped:,} queries the document with the query's own id is not "
                "ranked; --keep-identical-ids ranks it",
                highlight=False,
                soft_wrap=True,
            )
