"""The statistics of a folder of verdicts, against counts by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.taught_folder import (
    FORMAT,
    candidate_schema,
    line_digest,
    taught_lines,
    verdict_schema,
    write_parquet,
)
from dream_training.data.taught_statistics import describe_taught

TWICE = 3.0 * math.log(2.0)  # nats that double a weight at the default temperature
# Logits, the positive, and the origins of the candidates.
LINES = [
    ([TWICE, 0.0], 0, ["given", "bm25"]),
    ([0.0, TWICE, -1.0], 0, ["given", "bm25", "retriever"]),
    ([0.0, 5.0, 9.0], 0, ["given", "batch", "retriever"]),
    ([1.0, 1.0], -1, ["given", "given"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for i, (logits, positive, origins) in enumerate(LINES):
        documents = [f"document {i} {j}" for j in range(len(logits))]
        won = None if positive < 0 else logits[positive] == max(logits)
        row = {"query": f"query {i}", "target": "t", "documents": documents, "positive": positive}
        rows.append({**row, "logits": logits, "origins": origins, "positive_won": won})
    manifest = {
        "format": FORMAT, "lines": 6, "heads": {"0": [1]}, "reader": "r", "identity": "i",
        "digest": "d",
        "settings": {"pool": "mined", "batch_size": 2, "lines_per_file": 4, "seed": 0},
    }  # fmt: skip
    (tmp_path / "lines-00000").mkdir()
    (tmp_path / "lines-00000" / "manifest.json").write_text(json.dumps(manifest))
    given = [{**row, "digest": line_digest(row)} for row in (*rows, *rows[:2])]
    write_parquet(tmp_path / "lines-00000" / "candidates.parquet", given, candidate_schema())
    (lines,) = taught_lines(tmp_path)
    assert [len(part.batches) for part in lines.parts] == [2, 1]
    write_parquet(lines.parts[0].path, rows, verdict_schema(), lines.stamp)
    return tmp_path


def test_what_the_teacher_says_is_counted(folder: Path) -> None:
    result = describe_taught(folder)
    expected: dict[str, Any] = {
        "lines": 4,
        "files": 2,
        "absent": 1,
        "origins": {"given": 5, "bm25": 2, "retriever": 2, "batch": 1},
        "flat": 1,
        "flat_queries": ["query 3"],
        "known": 3,
        "agrees": round(1 / 3, 4),
        "chance": round((1 / 2 + 1 / 3 + 1 / 3) / 3, 4),
        "reciprocal_rank": round((1 + 1 / 2 + 1 / 3) / 3, 4),
        "others": {
            "bm25": {"count": 2, "preferred": 1},
            "retriever": {"count": 2, "preferred": 1},
            "batch": {"count": 1, "preferred": 1},
        },
    }
    assert {key: result[key] for key in expected} == expected
    assert result["weight_of_best"]["min"] == 0.5
    weights = [own / (3 + math.exp(-1 / 3)) for own in (1, 2, math.exp(-1 / 3))]
    choices = math.exp(-sum(own * math.log(own) for own in weights))
    assert result["choices"]["max"] == pytest.approx(choices, abs=1e-4)
    assert result["lead"]["max"] == 4.0 and result["lead"]["min"] == 0.0
    preferred = [
        (found["nats"], found["query"], found["document"]) for found in result["preferred"]
    ]
    assert preferred == [
        (9.0, "query 2", "document 2 2"),
        (5.0, "query 2", "document 2 1"),
        (round(TWICE, 4), "query 1", "document 1 1"),
    ]
    # A weight of two thirds against one third, from the first line alone.
    assert describe_taught(folder, limit=1)["weight_of_best"]["mean"] == round(2 / 3, 4)
    assert describe_taught(folder, 1.5, limit=1)["weight_of_best"]["mean"] == 0.8


def test_the_command_tells_a_folder_of_verdicts(folder: Path) -> None:
    result = CliRunner().invoke(app, ["data", "stats", str(folder)], catch_exceptions=False)
    for text in (
        "files not written yet            1 of 2",
        "it is the teacher's best        33.3%",
        "1 line whose target no document changes, such as",
        "9.0 nats, retriever: query 2",
    ):
        assert text in result.stdout
    assert "batch: query" not in result.stdout
    told = CliRunner().invoke(app, ["data", "stats", str(folder), "--json"], catch_exceptions=False)
    assert json.loads(told.stdout)["preferred"][0]["target"] == "t"


def test_a_folder_without_verdicts_is_named(folder: Path) -> None:
    for path in folder.glob("train-*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no verdict yet: run dream teach again"):
        describe_taught(folder)
    with pytest.raises(FileNotFoundError, match="is no folder of dream teach"):
        describe_taught(folder / "lines-00000")
