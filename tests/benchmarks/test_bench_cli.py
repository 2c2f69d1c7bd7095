"""The commands as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dream_benchmarks import records, sanitized
from dream_benchmarks.cli import main
from helpers.own_process import run_command

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: object, module: str = "dream_benchmarks") -> subprocess.CompletedProcess[str]:
    return run_command(
        *(sys.executable, "-m", module, *arguments),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"},
    )


def test_a_quick_kernel_run_writes_its_records(tmp_path: Path) -> None:
    result = bench(
        "kernel", "--quick", "--device", "cpu", "--case", "full", "--peer", "ours (cpu)",
        "--peer", "flash", "--output", tmp_path, "--runs", 2, "--no-memory",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("kernel-*.jsonl")
    assert str(path) in result.stdout
    assert {r["status"] for r in records.read(tmp_path)} == {"ok", "refused"}
    assert all(r["quick"] for r in records.read(tmp_path))
    assert "flash_attn, no scores: refused, flash_attn is not installed" in result.stdout


def test_dream_bench_is_the_same_suite() -> None:
    result = bench("bench", "--help", module="dream_training.cli")
    assert result.returncode == 0, result.stderr
    for command in ("kernel", "step", "scaling", "report", "gpu-acceptance", "compare"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize(
    "arguments,message",
    (
        (("kernel", "--peer", "nobody"), "no peer is called 'nobody'"),
        (("kernel", "--case", "nothing"), "no case has 'nothing'"),
        (("step", "--model", "gpt"), "model must be one of"),
        (("report", "--output", "-"), "--output must be a folder, got -"),
        (("report", "--output", "nowhere"), "there are no records in nowhere"),
        (("predict", "--resources", "nowhere"), "must be a file, got nowhere"),
        (("gpu-acceptance",), "gpu-acceptance needs an NVIDIA GPU"),
        (("gpu-acceptance", "--rehearse", "--stage", "speed"), "stage must be one of"),
        (("compile-ahead", "--cache", "nowhere", "--arch", "mi300"), "arch must be sm_80"),
        (("compare", "--base", "no-such-revision"), "git knows no revision 'no-such-revision'"),
    ),
)
def test_mistakes_end_in_one_line(monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match=message) as stopped:
        main()
    assert "\n" not in str(stopped.value) and capsys.readouterr().out == ""


def test_predictions_come_with_their_error() -> None:
    result = bench("predict")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "published  predicted  error" in lines[0]
    assert any(line.startswith("FlashAttention 3") and line.endswith("%") for line in lines)
    assert any("16 documents, shared pool  query, scores" in line for line in lines)


def test_small_shapes_run_for_a_sanitizer(capsys: pytest.CaptureFixture[str]) -> None:
    sanitized.main("cpu")
    assert "ours (cpu)" in capsys.readouterr().out
