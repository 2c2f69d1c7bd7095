"""Every file that a command writes: its permissions, through links and pipes, and as ``-``."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.config import TrainConfig
from dream_training.training import faults
from dream_training.training.driver import train
from helpers.tiny import make_rows, quiet, write_tiny_data


def dream(*arguments: object):
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def settings(model: Path, folder: Path, **changes) -> TrainConfig:
    data, beir = write_tiny_data(folder, 12)
    return TrainConfig(
        **{
            "reader": str(model),
            "retriever": str(model),
            "retriever_layers": 1,
            "train_data": str(data),
            "eval_data": str(beir),
            "top_k": 2,
            "batch_size": 4,
            "max_steps": 1,
            "eval_steps": 1,
            "report_queries": 2,
            "device": "cpu",
            "output_dir": str(folder / "run"),
            **changes,
        }
    )


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_permissions_are_those_of_the_umask(
    tiny_model: Path, tmp_path: Path, monkeypatch, umask: int
) -> None:
    """All commands that write, and then the whole folder."""
    before = os.umask(umask)
    try:
        write_all(tiny_model, tmp_path, monkeypatch)
    finally:
        os.umask(before)
    kinds = set()
    for path in tmp_path.rglob("*"):
        own = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == own & ~umask, path
        kinds.add(path.name if path.is_dir() or "store" not in path.parts else path.suffix)
    assert kinds >= {
        "best", "last", "checkpoints", "faults", "step-00000002", "model.safetensors",
        "weights.safetensors", "optimizer.safetensors", "manifest.json", "step-1.jsonl",
        "heads.yaml", "heads.png", "config.json", "history.json", "curve.png", "evaluation.json",
        "examples.json", "environment.json", ".safetensors", "own.json", "own.png", "mined.jsonl",
        "mined.provenance.json", "prepared.jsonl", "targets.jsonl", "scores.json", "report.html",
        "comparison.json", "comparison.png", "result.json", "comparison-top2.json",
        "overlap-top2.png", "random-0.yaml", "corpus.jsonl", "test.tsv",
    }  # fmt: skip


def write_all(tiny_model: Path, folder: Path, monkeypatch) -> None:
    config = settings(tiny_model, folder, max_steps=2, document_store=str(folder / "store"))
    data, beir = config.train_data, config.eval_data
    original, calls = faults._all_finite, []

    def finite(*args):
        calls.append(original(*args))
        return len(calls) > 1

    monkeypatch.setattr(faults, "_all_finite", finite)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.flat()))
    dream("train", file)
    best = folder / "run" / "best"
    dream("evaluate", best, beir, "--output", folder / "scores.json")
    dream("report", folder / "run")
    dream("mine", data, "--output", folder / "mined.jsonl", "--per-query", 2)
    dream("data", "prepare", data, "--output", folder / "prepared.jsonl")
    rows = [{key: row[key] for key in ("query", "documents", "positive")} for row in make_rows(2)]
    (folder / "bare.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dream(
        "data", "targets", folder / "bare.jsonl", "--reader", tiny_model, "--device", "cpu",
        "--max-new-tokens", 4, "--output", folder / "targets.jsonl",
    )  # fmt: skip
    reader = ("heads", "--reader", tiny_model, "--data", data, "--examples", 4, "--pool-size", 4)
    dream(*reader, "--output", folder / "own.json")
    dream(
        *reader, "--compare", "--criterion", "random", "--draws", 1, "--top-k", 2,
        "--output", folder / "choices",
    )  # fmt: skip
    compared = config.with_changes(output_dir=str(folder / "compared"), max_steps=1)
    section = {"runs": {"a": {"objective": "infonce", "document_store": None}}}
    file.write_text(yaml.safe_dump({**compared.flat(), "compare": section}))
    dream("compare", file)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run."""
    config = settings(tiny_model, tmp_path_factory.mktemp("trained"), objective="infonce")
    train(config, console=quiet())
    return config


def commands(config: TrainConfig) -> dict[str, tuple[object, ...]]:
    """Each command that writes a file to ``--output``."""
    data = config.train_data
    return {
        "evaluate": ("evaluate", Path(config.output_dir) / "best", config.eval_data),
        "report": ("report", config.output_dir),
        "mine": ("mine", data, "--per-query", 2),
        "prepare": ("data", "prepare", data),
        "targets": ("data", "targets", data, "--reader", config.reader.model, "--device", "cpu"),
        "heads": (
            "heads", "--reader", config.reader.model, "--data", data, "--examples", 4,
            "--pool-size", 4,
        ),
    }  # fmt: skip


def check(name: str, text: str) -> None:
    """Check that a text is all that a command writes, and nothing else."""
    if name == "evaluate":
        assert [e["model"] for e in json.loads(text)["evaluations"]][-1] == "BM25"
    elif name == "report":
        assert text.startswith("<!") and text.rstrip().endswith("</html>")
    elif name == "heads":
        found = yaml.safe_load(text)
        assert len(found["head_scores"]) == 12 and found["provenance"]
    else:
        assert len([json.loads(line)["query"] for line in text.splitlines()]) == 12


NAMES = ("evaluate", "report", "mine", "prepare", "targets", "heads")


@pytest.mark.parametrize("name", NAMES)
def test_a_dash_is_standard_output(trained, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = dream(*commands(trained)[name], "--output", "-")
    check(name, result.stdout)
    assert result.stderr, "what is for people goes to standard error"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pipes_stay(trained, tmp_path: Path, name: str) -> None:
    suffix = ".yaml" if name == "heads" else ".out"
    link, target = tmp_path / f"link{suffix}", tmp_path / "far" / f"target{suffix}"
    link.symlink_to(target)
    dream(*commands(trained)[name], "--output", link)
    assert link.is_symlink() and [p.name for p in (tmp_path / "far").iterdir()] == [target.name]
    check(name, target.read_text())

    pipes, read = tmp_path / "pipes", []
    pipes.mkdir()
    os.mkfifo(pipes / "pipe")
    reader = threading.Thread(target=lambda: read.append((pipes / "pipe").read_text()), daemon=True)
    reader.start()
    dream(*commands(trained)[name], "--output", pipes / "pipe")
    reader.join()
    check(name, read[0])
    assert stat.S_ISFIFO((pipes / "pipe").stat().st_mode)
    assert [path.name for path in pipes.iterdir()] == ["pipe"]


def test_a_folder_is_no_stream(trained) -> None:
    arguments = [*commands(trained)["heads"], "--compare", "--output", "-"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert str(result.exception) == "--output must be a folder with --compare, got -"
    with pytest.raises(ValueError, match="output_dir must be a folder, got -"):
        train(trained.with_changes(output_dir="-"), console=quiet())
