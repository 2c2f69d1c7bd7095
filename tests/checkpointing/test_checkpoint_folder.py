"""Checkpoint folders: complete or absent, verified, and refused by name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dream_training.checkpointing.folder import (
    MANIFEST,
    CheckpointError,
    has_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from helpers.own_process import in_own_process


def write(folder: Path, step: int = 1):
    weights = {"a": torch.full((2, 3), float(step)), "b": torch.tensor(3, dtype=torch.int64)}
    return write_checkpoint(folder, step, {"weights": weights}, {"run": {"step": step, "x": 0.1}})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path, 7)
    read = read_checkpoint(written.path)
    assert read.step == 7 and read.path.name == "step-00000007"
    assert torch.equal(read.tensors("weights")["a"], torch.full((2, 3), 7.0))
    assert read.document("run") == {"step": 7, "x": 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_the_newest_intact_one_is_used(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        write(tmp_path, step)
    refused: list[str] = []
    (tmp_path / "step-00000010" / "weights.safetensors").write_bytes(b"")
    newest = newest_checkpoint(tmp_path, refused.append)
    assert newest is not None and newest.step == 4
    assert len(refused) == 1 and "step-00000010/weights.safetensors" in refused[0]
    prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    assert newest_checkpoint(tmp_path / "nowhere", refused.append) is None
    assert not has_checkpoints(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["weights.safetensors", "run.json", MANIFEST])
def test_every_altered_byte_is_detected(tmp_path: Path, name: str) -> None:
    """At a few hundred places in the file: one bit flipped, and the file cut there."""
    path = write(tmp_path).path
    whole = (path / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        (path / name).write_bytes(altered)
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(path)
        (path / name).write_bytes(whole[:place])
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(path)
    (path / name).write_bytes(whole)
    read_checkpoint(path)


def test_extra_and_missing_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path).path
    (path / "extra.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"extra.pt: it does not belong there"):
        read_checkpoint(path)
    (path / "extra.pt").unlink()
    (path / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run.json: it is missing"):
        read_checkpoint(path)
    (path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_checkpoint(path)
    (path / MANIFEST).write_text(json.dumps({"format": "another"}))
    with pytest.raises(CheckpointError, match="must be a 'dream-kernels checkpoint 1'"):
        read_checkpoint(path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 3).path
    moved = path.rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="altered"):
        read_checkpoint(moved)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failing_disk_keeps_the_old_checkpoints(tmp_path: Path, monkeypatch, call: str) -> None:
    write(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    read_checkpoint(tmp_path / "step-00000001")


def write_to_a_full_disk(folder: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"big.safetensors"):
        write_checkpoint(folder, 1, {"big": {"a": torch.zeros(10_000)}}, {})


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The safetensors writer's own error, under the system's limit on file sizes."""
    pytest.importorskip("resource")
    in_own_process(write_to_a_full_disk, tmp_path)
    assert list(tmp_path.iterdir()) == []
