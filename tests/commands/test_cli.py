"""The ``dream`` command as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from dream_kernels import read_heads
from dream_training.cli import app
from helpers.own_process import run_command, run_dream
from helpers.tiny import make_rows


def dream(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    return run_dream(*arguments, cwd=cwd, env=environment)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, make_rows(12))))
    return path


def test_help_lists_the_commands() -> None:
    """In a fresh interpreter."""
    result = run_command(sys.executable, "-m", "dream_training.cli", "--help")
    assert result.returncode == 0, result.stderr
    for command in ("demo", "doctor", "heads", "train", "evaluate", "bench"):
        assert f"\n  {command} " in result.stdout


HELP = """
import sys
from dream_training.cli import main
for command in sys.argv[1:]:
    sys.argv = ["dream", *command.split(), "--help"]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, command
    assert "torch" not in sys.modules, command
"""


def test_help_does_not_load_torch() -> None:
    group = get_command(app).commands
    names = [*group, *(f"data {name}" for name in group["data"].commands)]
    result = run_command(sys.executable, "-c", HELP, *names)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: dream") == len(names) > 12


def test_heads_then_train_then_evaluate(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    result = dream(
        "heads", "--reader", tiny_model, "--data", data, "--output", tmp_path / "heads.yaml",
        "--top-k", 3, "--pool-size", 4,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    heads = read_heads(tmp_path / "heads.yaml")
    assert heads.chosen == 3 and len(heads.scores) == 12 and heads.provenance["data"] == str(data)
    assert f"These 3 of 12 heads and the scores of all:  {tmp_path / 'heads.yaml'}" in result.stdout
    assert (tmp_path / "heads.png").stat().st_size > 5000
    best = "-".join(map(str, heads.heads[0]))
    assert f"   1  {best:>6}  {heads.scores[heads.heads[0]]:.4f}" in result.stdout

    config = tmp_path / "config.yaml"
    config.write_text(
        f"reader: {tiny_model}\nretriever: {tiny_model}\nheads: {tmp_path / 'heads.yaml'}\n"
        f"train_data: {data}\nbatch_size: 4\nmax_steps: 9\n"
    )
    out = tmp_path / "out"
    result = dream("train", config, "max_steps=2", f"output_dir={out}", "lora_r=2")
    assert result.returncode == 0, result.stderr
    assert f'SentenceTransformer("{out / "best"}")' in result.stdout
    assert "Nothing was evaluated: best/ is a copy of last/" in result.stdout
    assert json.loads((out / "config.json").read_text())["max_steps"] == 2
    assert read_heads(out / "heads.yaml") == heads

    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    corpus = [{"_id": "a", "title": None, "text": "apples"}, {"_id": "b", "text": "rivers"}]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "1", "text": "rivers"}))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tb\t1\n")
    result = dream("evaluate", out / "best", beir)
    assert result.returncode == 0, result.stderr
    bm25 = next(line for line in result.stdout.splitlines() if "BM25" in line)
    assert bm25.split() == ["beir", "BM25", "1.0000", "1.0000", "1", "2"]


def test_mistakes_end_in_one_line(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"reader: {tiny_model}\ntrain_data: {data}\nlearning_rat: 1\n")
    result = dream("train", config)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"dream: {config}: unknown key 'learning_rat'; did you mean 'learning_rate'?"
    )
    data.write_text('{"target": "t", "documents": ["d"]}\n')
    result = dream("heads", "--reader", tiny_model, "--data", data)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(f"{data}:1: has no query; its keys are target, documents")
    assert "Traceback" not in result.stderr
