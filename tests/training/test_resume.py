"""Runs that are stopped and resumed equal runs that were not interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from dream_training.choices import OBJECTIVES
from dream_training.config import TrainConfig
from dream_training.training.driver import train
from dream_training.training.resuming import CHECKPOINTS
from dream_training.training.signals import StopSignals
from helpers.killed_run import kill_and_compare, outcome
from helpers.own_process import TIMEOUT_S, in_own_process, run_dream
from helpers.soak_record import SOAK, record
from helpers.tiny import quiet

pytestmark = pytest.mark.long


class Stop(TrainerCallback):
    """Sends the process a signal during a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            # The run's own handler, or it would be pytest that stops.
            assert isinstance(getattr(signal.getsignal(self.number), "__self__", None), StopSignals)
            signal.raise_signal(self.number)


def both(run, tmp_path: Path, stop: int, number: int = signal.SIGTERM, **changes):
    """Outcomes of an uninterrupted run, and of one stopped after a step and resumed."""
    changes = {"max_steps": 8, "eval_steps": 4, "learning_rate": 3e-3, **changes}
    alone = run(output_dir=str(tmp_path / "alone"), **{**changes, "dataloader_workers": 0})
    stopped = run(output_dir=str(tmp_path / "stopped"), **changes)
    train(alone, console=quiet())
    if stopped.dataloader_workers:
        in_own_process(stop_and_resume, stopped, stop, number)
    else:
        stop_and_resume(stopped, stop, number)
    return outcome(Path(alone.output_dir)), outcome(Path(stopped.output_dir))


def stop_and_resume(config: TrainConfig, stop: int, number: int) -> None:
    result = train(config, console=quiet(), callbacks=[Stop(stop, number)])
    assert result.interrupted and result.signal == number
    assert len(result.history.steps) == stop
    train(config, console=quiet(), resume=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_resumes(run, tmp_path: Path, objective: str) -> None:
    # Six batches an epoch: the eighth step is in the second one.
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
        {"trained_share": 0.5, "lora_r": 0},
        {"dataloader_workers": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_over_a_run_resumes(run, tmp_path: Path, changes: dict) -> None:
    """Stopped in the second epoch."""
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


def test_killed_runs_equal_an_uninterrupted_one(run, tmp_path: Path) -> None:
    kills = 20 if SOAK else 3
    config = run(
        max_steps=10, eval_steps=3, save_steps=2, document_store="memory", report_queries=2
    )
    found = in_own_process(kill_and_compare, config, tmp_path / "runs", kills, seed=1)
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
    assert "resuming after step 2" in printed
    assert [s["loss"] for s in again] == [s["loss"] for s in alone]


def test_a_finished_run_whose_checkpoints_are_damaged_stays(run, tmp_path: Path) -> None:
    train(run(keep_checkpoints=1), console=quiet())
    (manifest,) = (tmp_path / "out" / CHECKPOINTS).glob("*/manifest.json")
    manifest.write_text("{}")
    before = outcome(tmp_path / "out")
    with pytest.raises(FileExistsError, match="there is no checkpoint to resume from: use --over"):
        train(run(), console=quiet(), resume=True)
    assert outcome(tmp_path / "out") == before


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


def test_mistakes_in_resuming_are_named(run, tmp_path: Path) -> None:
    console = quiet()
    train(run(max_steps=8), console=console, callbacks=[Stop(3, signal.SIGTERM)])
    assert "--resume continues after step 3" in console.file.getvalue()
    with pytest.raises(FileExistsError, match="use --resume to continue after step 3, --overwrite"):
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


def test_resuming_without_a_checkpoint_starts_anew(run) -> None:
    console = quiet()
    result = train(run(save_steps=0), console=console, resume=True)
    assert "starting at the first step" in console.file.getvalue()
    assert len(result.history.steps) == 4


# The command; it waits in the second step for the signal.
WAITING = """
import time
from dream_training.cli import main
from dream_training.training.signals import StopSignals
original = StopSignals.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    while state.global_step == 2 and self.received is None:
        time.sleep(0.01)
    original(self, args, state, control, **kwargs)
StopSignals.on_step_end = on_step_end
main()
"""


def test_the_command_resumes(run, tmp_path: Path) -> None:
    """SIGTERM from outside: exit code 143, what to do next, and the same losses in the end."""
    import yaml

    changes = {"max_steps": 8, "eval_data": None, "output_dir": str(tmp_path / "stopped")}
    path = tmp_path / "stopped.yaml"
    path.write_text(yaml.safe_dump(asdict(run(**changes))))
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    bound = threading.Timer(TIMEOUT_S, process.kill)
    bound.start()
    printed = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if line.startswith("step 2/8"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 143, printed
    finally:
        bound.cancel()
        process.kill()
    text = " ".join("".join(printed).split())
    assert "SIGTERM: stopping after this step" in text and "--resume continues after step 2" in text
    alone = train(run(**{**changes, "output_dir": str(tmp_path / "alone")}), console=quiet())
    done = run_dream("train", path, "--resume")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "stopped" / "history.json").read_text())["steps"]
    assert len(steps) == 8
    assert [step["loss"] for step in steps] == [step["loss"] for step in alone.history.steps]


def test_a_model_folder_that_was_half_moved_is_repaired(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(run(), console=quiet())
    # As a kill between the two renames leaves it.
    half = out / ".last.0123abcd.dream.tmp"
    half.mkdir()
    (out / "last").rename(half / "old")
    shutil.copytree(half / "old", half / "new")
    train(run(max_steps=4), console=quiet(), resume=True)
    assert not half.exists()
    SentenceTransformer(str(out / "last"), device="cpu")
