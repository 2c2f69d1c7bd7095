"""``dream teach`` under torchrun: the processes share the files, and one prepares."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from dream_training.teaching.teach import teach
from helpers.own_process import run_dream
from helpers.taught import rows_of, same_rows, teaching_config
from helpers.tiny import quiet


def test_two_processes_share_the_files(folder: str, tmp_path: Path) -> None:
    config = teaching_config(Path(folder), tmp_path, heads="auto", top_k=4)
    teach(config, tmp_path / "alone", lines_per_file=4, console=quiet())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.flat().items() if v is not None}))
    shared = tmp_path / "shared"
    done = run_dream(
        "teach", path, "--output", shared, "--lines-per-file", 4, "--from-batch", 0,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(shared.glob("train-*.parquet"))) == 3
    same_rows(rows_of(tmp_path / "alone"), rows_of(shared))
    # Both processes had the heads that the first one has selected.
    manifests = [
        json.loads((tmp_path / name / "lines-00000" / "manifest.json").read_text())
        for name in ("alone", "shared")
    ]
    assert manifests[0]["heads"] == manifests[1]["heads"]
    assert manifests[0]["identity"] == manifests[1]["identity"]
    assert "The verdicts:" in done.stdout and done.stdout.count("lines were taught") == 1
    refused = run_dream(
        "teach", path, "--output", shared, "--lines-per-file", 4, "--shard", "0/2",
        env={**os.environ, "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert refused.returncode == 1
    assert "shard must be left out with torchrun" in refused.stderr
