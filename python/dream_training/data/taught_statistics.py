"""What a folder of ``dream teach`` holds: how sure the teacher is, and where it disagrees."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from dream_training.console import make_table, shortened, tracked
from dream_training.data.taught_folder import (
    FLAT,
    ORIGINS,
    absent_parts,
    taught_lines,
    verdict_tables,
)

# Candidates that are kept, of those that the teacher prefers to a known positive, and shown.
_KEPT, _SHOWN = 100, 5
_SHOWN_QUERIES = 3
_CHARACTERS = 60


def is_flat(logits: Sequence[float]) -> bool:
    """Whether no document changes the target by more than rounding."""
    return max(logits) - min(logits) < FLAT


def describe_taught(
    folder: str | os.PathLike[str], teacher_temperature: float = 3.0, limit: int | None = None
) -> dict[str, Any]:
    """Describe the verdicts of a folder in one pass over them.

    Args:
        folder: of ``dream teach``.
        teacher_temperature: divides the logits where they become weights, in nats.
        limit: stop after so many lines.

    Returns:
        Values for JSON:

        - ``lines``, ``files`` and ``absent``: how many lines there are, how many files there will
          be, and how many are not written yet;
        - ``candidates``: quantiles of the documents of a line, and ``origins``: how many of each;
        - ``weight_of_best``, ``choices`` and ``lead``: quantiles of the weight of the best
          document, of the exponential of the weights' entropy, and of the nats by which it is
          above the second;
        - ``flat``: lines whose target no document changes, and ``flat_queries``, the first ones;
        - ``known``: lines with a known positive; of these ``agrees``, the share in which it is
          the best document, ``chance``, what guessing would give, and ``reciprocal_rank``;
        - ``others``: by origin, the candidates of these lines beside the positive, and how many
          of them the teacher finds more relevant;
        - ``preferred``: those of them with the most nats above the positive.

    Raises:
        FileNotFoundError: the folder is not one of ``dream teach``.
        ValueError: a file is damaged, or there is no verdict.
    """
    lines = taught_lines(folder)
    state = _State(teacher_temperature)
    rows = (row for table in verdict_tables(folder) for row in table.to_pylist())
    for count, row in enumerate(tracked(rows, "counting lines"), 1):
        state.add(row)
        if count == limit:
            break
    if not state.lines:
        raise ValueError(f"{folder}: has no verdict yet: run dream teach again, which resumes")
    return {
        "lines": state.lines,
        "files": sum(len(own.parts) for own in lines),
        "absent": len(absent_parts(lines)),
        "teacher_temperature": teacher_temperature,
        **state.result(),
    }


@dataclass
class _State:
    temperature: float
    lines: int = 0
    flat: int = 0
    won: int = 0
    flat_queries: list[str] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    choices: list[float] = field(default_factory=list)
    lead: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    reciprocal: list[float] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=dict)
    others: dict[str, list[int]] = field(default_factory=dict)
    preferred: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        logits = np.asarray(row["logits"], dtype=np.float64)
        self.lines += 1
        self.candidates.append(len(logits))
        for origin in row["origins"]:
            self.origins[origin] = self.origins.get(origin, 0) + 1
        if is_flat(row["logits"]):
            self.flat += 1
            if len(self.flat_queries) < _SHOWN_QUERIES:
                self.flat_queries.append(row["query"])
        weights = np.exp((logits - logits.max()) / self.temperature)
        weights /= weights.sum()
        self.best.append(weights.max())
        self.choices.append(float(np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum())))
        second, first = np.sort(logits)[-2:] if len(logits) > 1 else (0.0, 0.0)
        self.lead.append(first - second)
        if row["positive"] >= 0:
            self._compare(row, logits)

    def _compare(self, row: dict[str, Any], logits: np.ndarray) -> None:
        """Compare the other candidates with the known positive."""
        place = row["positive"]
        above = logits > logits[place]
        self.won += row["positive_won"]
        self.chance.append(1 / len(logits))
        self.reciprocal.append(1 / (1 + int(above.sum())))
        for i, origin in enumerate(row["origins"]):
            if i == place:
                continue
            counts = self.others.setdefault(origin, [0, 0])
            counts[0] += 1
            counts[1] += bool(above[i])
            if above[i]:
                nats = float(logits[i] - logits[place])
                found = {
                    "nats": round(nats, 4),
                    "origin": origin,
                    "query": row["query"],
                    "target": row["target"],
                    "document": row["documents"][i],
                }
                heapq.heappush(self.preferred, (nats, -self.lines * 10**6 - i, found))
                if len(self.preferred) > _KEPT:
                    heapq.heappop(self.preferred)

    def result(self) -> dict[str, Any]:
        known = len(self.chance)
        return {
            "candidates": _spread(self.candidates),
            "origins": {name: self.origins[name] for name in ORIGINS if name in self.origins},
            "weight_of_best": _spread(self.best),
            "choices": _spread(self.choices),
            "lead": _spread(self.lead),
            "flat": self.flat,
            "flat_queries": self.flat_queries,
            "known": known,
            "agrees": round(self.won / known, 4) if known else None,
            "chance": round(float(np.mean(self.chance)), 4) if known else None,
            "reciprocal_rank": round(float(np.mean(self.reciprocal)), 4) if known else None,
            "others": {
                name: {"count": self.others[name][0], "preferred": self.others[name][1]}
                for name in ORIGINS
                if name in self.others
            },
            "preferred": [found for *_, found in sorted(self.preferred, reverse=True)],
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 90th percentile, maximum and mean."""
    numbers = np.asarray(values, dtype=np.float64)
    found = {
        "min": numbers.min(),
        "median": np.median(numbers),
        "p90": np.quantile(numbers, 0.9),
        "max": numbers.max(),
        "mean": numbers.mean(),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def taught_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of what :func:`describe_taught` returned."""
    lines, known = result["lines"], result["known"]
    table = make_table("", "")
    table.show_header = False
    table.add_row("lines", f"{lines:,}")
    if result["absent"]:
        table.add_row("files not written yet", f"{result['absent']:,} of {result['files']:,}")
    table.add_row("target that no document changes", f"{result['flat']:,}")
    table.add_row("with a known positive", f"{known:,}")
    if known:
        table.add_row("  it is the teacher's best", f"{result['agrees']:.1%}")
        table.add_row("  by chance", f"{result['chance']:.1%}")
        table.add_row("  mean reciprocal rank", f"{result['reciprocal_rank']:.3f}")
    yield table

    table = make_table("of a line", "min", "median", "90 %", "max", "mean")
    for name, key in (
        ("candidates", "candidates"),
        ("weight of the best", "weight_of_best"),
        ("choices (exp of entropy)", "choices"),
        ("lead of the best, nats", "lead"),
    ):
        values = result[key]
        table.add_row(
            name, *(f"{values[of]:,.4g}" for of in ("min", "median", "p90", "max", "mean"))
        )
    yield table

    if result["others"]:
        table = make_table("candidates beside the positive", "number", "above it", "share")
        for name, counts in result["others"].items():
            share = f"{counts['preferred'] / counts['count']:.1%}"
            table.add_row(name, f"{counts['count']:,}", f"{counts['preferred']:,}", share)
        yield table


def disagreements(result: dict[str, Any]) -> Iterator[str]:
    """Yield lines of text: where the teacher is flat, and what it prefers to a known positive."""
    if result["flat"]:
        lines = "line" if result["flat"] == 1 else "lines"
        yield f"{result['flat']:,} {lines} whose target no document changes, such as"
        yield from (f"    {shortened(query, _CHARACTERS)}" for query in result["flat_queries"])
    mined = [found for found in result["preferred"] if found["origin"] != "batch"]
    if mined:
        yield "Candidates that the teacher prefers to the known positive, the clearest first:"
    for found in mined[:_SHOWN]:
        yield f"    {found['nats']:.1f} nats, {found['origin']}: " + shortened(
            found["query"], _CHARACTERS
        )
        yield f"        {shortened(' '.join(found['document'].split()), _CHARACTERS)}"
