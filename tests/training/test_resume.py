"""Runs that are stopped and gone on with equal runs that were left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from killed_run import outcome
from sentence_transformers import SentenceTransformer
from tiny import quiet
from transformers import TrainerCallback

from dream_training.config import OBJECTIVES
from dream_training.training.driver import train
from dream_training.training.resuming import CHECKPOINTS
from soak_record import SOAK, record


class Stop(TrainerCallback):
    """Sends the process a signal during a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def both(run, tmp_path: Path, stop: int, number: int = signal.SIGTERM, **changes):
    """Outcomes of a run left alone, and of one stopped after a step and gone on with."""
    changes = {"max_steps": 8, "eval_steps": 3, "learning_rate": 3e-3, **changes}
    alone = run(output_dir=str(tmp_path / "alone"), **changes)
    stopped = run(output_dir=str(tmp_path / "stopped"), **changes)
    train(alone, console=quiet())
    result = train(stopped, console=quiet(), callbacks=[Stop(stop, number)])
    assert result.interrupted and result.signal == number
    assert len(result.history.steps) == stop
    train(stopped, console=quiet(), resume=True)
    return outcome(Path(alone.output_dir)), outcome(Path(stopped.output_dir))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_goes_on(run, tmp_path: Path, objective: str) -> None:
    # Six batches to a round: the eighth step is in the second one.
    first, second = both(run, tmp_path, 5, objective=objective)
    assert first == second
    assert len(first["history"]["steps"]) == 8 and len(first["files"]) >= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True},
        {"teaching": "direct"},
        {"document_store": "memory"},
        {"learnable_temperature": True, "mini_batch_size": 3},
        {"temperature_schedule": "linear", "temperature_end": 0.01, "lora_r": 0},
        {"dataloader_workers": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_over_a_run_goes_on(run, tmp_path: Path, changes: dict) -> None:
    """Stopped in the second round of the data."""
    first, second = both(run, tmp_path, 7, signal.SIGINT, **changes)
    assert first == second


def test_mined_pools_are_drawn_alike(run, tmp_path: Path) -> None:
    """Each query's own candidates, of which two are drawn for a step."""
    data = Path(run().train_data)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["documents"] += [rows[(i + k) % len(rows)]["documents"][0] for k in (3, 7, 11)]
    data.write_text("\n".join(map(json.dumps, rows)))
    first, second = both(run, tmp_path, 7, pool="mined", documents_per_query=2)
    assert first == second


def test_dropout_draws_the_same_masks(run, tmp_path: Path, monkeypatch) -> None:
    """The retriever gets a layer that draws, so that the generators' state matters."""
    from dream_training.models import loading

    original = loading.build_retriever

    def build(*args, **kwargs):
        model = original(*args, **kwargs)
        embeddings = model[0].auto_model.get_input_embeddings()
        embeddings.register_forward_hook(
            lambda module, _, out: torch.nn.functional.dropout(out, 0.3, module.training)
        )
        return model

    monkeypatch.setattr(loading, "build_retriever", build)
    first, second = both(run, tmp_path, 5)
    assert first == second
    losses = [step["loss"] for step in first["history"]["steps"]]
    assert len(set(losses)) == 8


def test_killed_runs_equal_one_left_alone(run, tmp_path: Path) -> None:
    kills = 20 if SOAK else 4
    config = asdict(
        run(max_steps=10, eval_steps=3, save_steps=2, document_store="memory", report_queries=2)
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "config.json", tmp_path / "runs", str(kills), "1"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["rounds"] >= 1, found
    assert found["differs"] == [], found
    record("runs killed", kills=kills, rounds=found["rounds"], differing=0)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(run, tmp_path: Path) -> None:
    config = run(max_steps=4, save_steps=1, keep_checkpoints=3, eval_data=None)
    alone = train(config, console=quiet()).history.steps
    checkpoints = tmp_path / "out" / CHECKPOINTS
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"step-{i:08d}" for i in (2, 3, 4)]
    for step, name in ((4, "optimizer.safetensors"), (3, "run.json")):
        path = checkpoints / f"step-{step:08d}" / name
        path.write_bytes(path.read_bytes()[:-1])
    console = quiet()
    again = train(config, console=console, resume=True).history.steps
    printed = console.file.getvalue()
    assert "step-00000004/optimizer.safetensors: it must have" in printed
    assert "step-00000003/run.json: it must have" in printed
    assert "going on after step 2" in printed
    assert [s["loss"] for s in again] == [s["loss"] for s in alone]


def test_checkpoints_hold_safetensors_and_json_only(run, tmp_path: Path) -> None:
    train(run(document_store="memory"), console=quiet())
    suffixes = {p.suffix for p in (tmp_path / "out" / CHECKPOINTS).rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_a_finished_run_has_nothing_left_to_do(run, tmp_path: Path) -> None:
    first = train(run(), console=quiet())
    before = outcome(tmp_path / "out")
    again = train(run(), console=quiet(), resume=True)
    assert again.history.steps == first.history.steps and again.path == first.path
    assert outcome(tmp_path / "out") == before
    longer = train(run(max_steps=6), console=quiet(), resume=True)
    assert [s["step"] for s in longer.history.steps] == [1, 2, 3, 4, 5, 6]


def test_mistakes_in_going_on_are_named(run, tmp_path: Path) -> None:
    console = quiet()
    train(run(max_steps=8), console=console, callbacks=[Stop(3, signal.SIGTERM)])
    assert "--resume goes on after step 3" in console.file.getvalue()
    with pytest.raises(FileExistsError, match="the newest of step 3: go on with --resume"):
        train(run(max_steps=8), console=quiet())
    with pytest.raises(ValueError, match=r"learning_rate is 0.5, and .*step-00000003 was written"):
        train(run(max_steps=8, learning_rate=0.5), console=quiet(), resume=True)
    with pytest.raises(ValueError, match="max_steps must be at least 3"):
        train(run(max_steps=2), console=quiet(), resume=True)
    data = Path(run().train_data)
    text = data.read_text()
    data.write_text(text.replace("apple", "pears"))
    with pytest.raises(ValueError, match=r"train_data .*train.jsonl has changed since"):
        train(run(max_steps=8), console=quiet(), resume=True)
    data.write_text(text)
    done = train(run(max_steps=8), console=quiet(), overwrite=True)
    assert [s["step"] for s in done.history.steps] == list(range(1, 9))


def test_going_on_without_a_checkpoint_begins(run) -> None:
    console = quiet()
    result = train(run(save_steps=0), console=console, resume=True)
    assert "starting at the first step" in console.file.getvalue()
    assert len(result.history.steps) == 4


def test_the_command_goes_on(run, tmp_path: Path) -> None:
    """SIGTERM from outside: exit code 143, what to do next, and the same losses in the end."""
    import yaml

    def command(output: str, *more: str) -> list[str]:
        values = asdict(run(max_steps=40, eval_data=None, output_dir=str(tmp_path / output)))
        (tmp_path / f"{output}.yaml").write_text(yaml.safe_dump(values))
        return [
            sys.executable,
            "-m",
            "dream_training.cli",
            "train",
            f"{tmp_path / output}.yaml",
            *more,
        ]

    process = subprocess.Popen(
        command("stopped"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 2/40"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, printed
    text = " ".join("".join(printed).split())
    assert "SIGTERM: stopping after this step" in text and "--resume goes on after step" in text
    train(run(max_steps=40, eval_data=None, output_dir=str(tmp_path / "alone")), console=quiet())
    done = subprocess.run(command("stopped", "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [
        [s["loss"] for s in json.loads((tmp_path / name / "history.json").read_text())["steps"]]
        for name in ("alone", "stopped")
    ]
    assert len(losses[0]) == 40 and losses[0] == losses[1]


def test_a_model_folder_that_was_half_moved_is_mended(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(run(), console=quiet())
    # As a kill between the two renames leaves it.
    half = out / ".last.abc"
    half.mkdir()
    (out / "last").rename(half / "old")
    shutil.copytree(half / "old", half / "new")
    train(run(max_steps=4), console=quiet(), resume=True)
    assert not half.exists()
    SentenceTransformer(str(out / "last"), device="cpu")
