"""Configs for ``dream teach`` on tiny data, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dream_training.config import TrainConfig
from dream_training.data.taught_folder import verdict_tables
from helpers.objectives import with_candidates
from helpers.tiny import make_config

Rows = list[dict[str, Any]]


def write_rows(path: Path, rows: Rows) -> str:
    """Write lines of training data; returns the file's name."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def teaching_config(tiny_model: Path, folder: Path, **changes: Any) -> TrainConfig:
    """A run on ten lines with two to four candidates of their own, and fixed heads."""
    data = write_rows(folder / "train.jsonl", with_candidates(10))
    heads = folder / "heads.yaml"
    heads.write_text('attn_head_set: "0-1,1-0,1-3,2-2"\n')
    return make_config(
        tiny_model,
        folder,
        **{
            "train_data": data,
            "heads": str(heads),
            "top_k": None,
            "pool": "mined",
            "batch_size": 4,
            "max_steps": 5,
            "eval_steps": 10,
            **changes,
        },
    )


def rows_of(folder: Path) -> Rows:
    """All verdicts of a folder."""
    return [row for table in verdict_tables(folder) for row in table.to_pylist()]


def same_rows(first: Rows, second: Rows) -> None:
    """Assert that verdicts are the same, logits up to rounding.

    A document that is read in another batch is the same only up to rounding.
    """
    for one, other in zip(first, second, strict=True):
        logits = torch.tensor(one["logits"])
        torch.testing.assert_close(logits, torch.tensor(other["logits"]), rtol=1e-5, atol=1e-5)
        assert {**one, "logits": None} == {**other, "logits": None}
