"""The page of ``dream report``, filled into its template."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dream_kernels.files import write_text
from dream_training.console import progress
from dream_training.evaluation.paired import Comparison, compare_queries, describe_p
from dream_training.evaluation.results import (
    UNTRAINED,
    Evaluation,
    compare_settings,
    is_same_task,
)
from dream_training.report.figures import curves, head_map, series_style
from dream_training.report.run_folder import Run

_SHOWN_DOCUMENT = 160


def write_report(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write one self-contained HTML page: no script, no network, light and dark.

    Args:
        runs: at least one; the first is the one that the others are compared with.
        path: HTML file; an existing one is replaced as a whole.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    with progress("drawing the page"):
        text = render(runs)
    write_text(path, text)
    return Path(path)


def render(runs: Sequence[Run]) -> str:
    """Return the page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dream_training.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = _number
    styles = [series_style(i) for i in range(len(runs))]
    return environment.get_template("page.html").render(
        runs=[
            {"run": run, "color": color, "dash": dash, "summary": _summary(run)}
            for run, (color, dash) in zip(runs, styles)
        ],
        curves=[Markup(svg) for _, svg in curves(runs)],
        tasks=_tasks(runs),
        differences=_differences(runs),
        heads=[
            {
                "name": run.name,
                "svg": Markup(head_map(run.heads, run.top_k, f"heads-{i}")),
                "top_k": run.top_k,
                "criterion": run.heads.provenance.get("criterion", ""),
            }
            for i, run in enumerate(runs)
            if run.heads is not None
        ],
        examples=[
            {"name": run.name, "queries": _examples(run.examples)} for run in runs if run.examples
        ],
        geometry=_geometry(runs),
        environments=_environments(runs),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _objective(config: Mapping[str, Any]) -> str:
    """The objective, and how it teaches where that is a choice."""
    name = config.get("objective", "")
    # Runs from before there was a choice taught directly.
    return f"{name}, {config.get('teaching', 'direct')}" if name == "dream" else name


def _summary(run: Run) -> dict[str, Any]:
    evaluations = run.history.evaluations
    steps = run.history.steps
    before = [e["ndcg_at_10"] for e in evaluations if e["step"] == 0]
    after = [e["ndcg_at_10"] for e in evaluations if e["step"] > 0]
    seconds = sum(step.get("seconds", 0.0) for step in steps)
    tokens = sum(step.get("tokens", 0.0) for step in steps)
    losses = [step["loss"] for step in steps if "loss" in step]
    tenth = max(1, len(losses) // 10)
    return {
        "objective": _objective(run.config),
        "steps": len(steps),
        "untrained": before[0] if before else None,
        "best": max(after) if after else None,
        "first_loss": sum(losses[:tenth]) / tenth if losses else None,
        "last_loss": sum(losses[-tenth:]) / tenth if losses else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "interrupted": run.interrupted,
    }


def _tasks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """By task: each model of each run, against its own untrained model and the first run."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for found_by_run in run.evaluations:
            entry: dict[str, Any] = {"run": run.name, "evaluation": found_by_run}
            same = (
                name
                for name, own in tasks.items()
                if is_same_task(own[0]["evaluation"], found_by_run)
            )
            tasks.setdefault(next(same, found_by_run.task), []).append(entry)
    found = []
    for task, rows in tasks.items():
        untrained = {r["run"]: r["evaluation"] for r in rows if r["evaluation"].model == UNTRAINED}
        trained = [r for r in rows if r["evaluation"].model != UNTRAINED]
        best = max((r["evaluation"].ndcg_at_10 for r in trained), default=None)
        champions = [r["evaluation"] for r in trained if r["evaluation"].ndcg_at_10 == best]
        for row in rows:
            evaluation: Evaluation = row["evaluation"]
            row["untrained"] = evaluation.model == UNTRAINED
            row["best"] = len(trained) > 1 and evaluation in champions
            row["against_untrained"] = row["against_first"] = None
            if not row["untrained"]:
                row["against_untrained"] = _compare(untrained.get(row["run"]), evaluation)
                if trained[0] is not row:
                    row["against_first"] = _compare(trained[0]["evaluation"], evaluation)
        found.append({"name": task, "rows": rows, "first": trained[0]["run"] if trained else None})
    return found


def _compare(a: Evaluation | None, b: Evaluation) -> dict[str, Any] | None:
    """A paired comparison, or the reason why there is none."""
    if a is None:
        return None
    if different := compare_settings(a, b).different:
        return {"reason": f"other {', '.join(different)}"}
    try:
        result: Comparison = compare_queries(a.query_ndcg_at_10, b.query_ndcg_at_10)
    except ValueError:
        return {"reason": "other queries"}
    return {"reason": "", "result": result, "p": describe_p(result.p_value)}


def _differences(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Config keys with the value of every run: those that differ, and the others."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows: dict[str, list[dict[str, Any]]] = {"different": [], "equal": []}
    for key in keys:
        values = [_text(run.config[key]) if key in run.config else "" for run in runs]
        rows["different" if len(set(values)) > 1 else "equal"].append(
            {"key": key, "values": values}
        )
    return rows


def _examples(examples: dict[str, Any]) -> list[dict[str, Any]]:
    """Each query with its documents in the order of their weight after training."""
    found = []
    for row in examples["queries"]:
        moments = [name for name in ("before", "after") if name in row]
        documents = [
            {
                "text": _shortened(text),
                "relevant": i == row["positive"],
                "mass": None if row["mass"] is None else row["mass"][i],
                **{name: row[name]["weights"][i] for name in moments},
            }
            for i, text in enumerate(examples["documents"])
        ]
        last = moments[-1]
        documents.sort(key=lambda document: -document[last])
        largest = max((d["mass"] or 0.0) for d in documents) or 1.0
        for document in documents:
            if document["mass"] is not None:
                # A tenth of the reader's attention is much for one document; weights sum to one.
                document["share"] = document["mass"] / largest
        found.append(
            {
                "query": row["query"],
                "target": row["target"],
                "documents": documents,
                "mass": None if row["mass"] is None else sum(row["mass"]),
                "losses": [
                    (name, row[name]["loss"]) for name in moments if row[name]["loss"] is not None
                ],
            }
        )
    return found


def _geometry(runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        geometry = run.examples.get("geometry", {})
        if "before" in geometry and "after" in geometry:
            rows.append({"name": run.name, **geometry})
    return rows


def _environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of a table: what the runs were made with."""
    flat = []
    for run in runs:
        environment = dict(run.environment)
        versions = environment.pop("versions", {})
        flat.append({**environment, **versions})
    keys = list(dict.fromkeys(key for values in flat for key in values))
    return [{"key": key, "values": [str(values.get(key, "")) for values in flat]} for key in keys]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _text(value: Any) -> str:
    """A config value as YAML would have it."""
    return "null" if value is None else str(value)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_DOCUMENT else text[: _SHOWN_DOCUMENT - 1] + "…"
