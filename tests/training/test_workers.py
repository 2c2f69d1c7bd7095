"""Processes of ``dataloader_workers`` that crash, are told to stop, or meet bad data."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from dream_training.checkpointing import folder as checkpoint_folder
from dream_training.config import TrainConfig
from dream_training.evaluation import RetrievalEvaluator
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.training.driver import train
from dream_training.training.resuming import CHECKPOINTS
from helpers.killed_run import outcome
from helpers.own_process import in_own_process
from helpers.tiny import make_config, quiet

pytestmark = pytest.mark.long

# Steps before the kill: after them come an evaluation and a checkpoint.
DONE = 3


CHANGES = {"max_steps": 6, "eval_steps": DONE, "save_steps": 1, "report_queries": 2}


@pytest.fixture
def config(run) -> TrainConfig:
    return run(dataloader_workers=2, **CHANGES)


def kill_a_worker() -> None:
    """Kill a process that makes batches; if it is a child, torch's handler raises from here."""
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in range(1000):
        time.sleep(0.01)


class Death(TrainerCallback):
    """Kills in a step, after one, in an evaluation or while a checkpoint is written."""

    def __init__(self, when: str) -> None:
        self.when, self.done = when, 0
        for kind, owner, name in (
            ("step", DistilledDreamLoss, "forward"),
            ("evaluation", RetrievalEvaluator, "__call__"),
            ("saving", checkpoint_folder, "_digest_of"),
        ):
            if kind == when:
                setattr(owner, name, self.instead_of(getattr(owner, name)))

    def instead_of(self, original):
        def call(*args, **kwargs):
            if self.done == DONE:
                kill_a_worker()
            return original(*args, **kwargs)

        return call

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.done = state.global_step
        if self.when == "between" and self.done == DONE:
            kill_a_worker()


def nothing_can_raise() -> None:
    """No child is left, and the end of another one reaches no handler that raises."""
    assert not multiprocessing.active_children()
    if (child := os.fork()) == 0:
        os._exit(3)
    os.waitpid(child, 0)
    signal.raise_signal(signal.SIGCHLD)


def run_with_a_death(config: TrainConfig, when: str) -> str:
    death = Death(when)
    try:
        train(config, console=quiet(), callbacks=[death])
    except ChildProcessError as error:
        # While the error, and with it every frame of the run, is alive.
        nothing_can_raise()
        return str(error)
    raise AssertionError("the run has not noticed it")


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The outcome of an undisturbed run."""
    config = make_config(tiny_model, tmp_path_factory.mktemp("alone"), **CHANGES)
    train(config, console=quiet())
    return outcome(Path(config.output_dir))


@pytest.mark.parametrize("when", ["step", "between", "evaluation", "saving"])
def test_a_dead_worker_ends_the_run_with_its_name(
    config: TrainConfig, alone: dict, when: str
) -> None:
    said = in_own_process(run_with_a_death, config, when)
    assert "a process of dataloader_workers (there are 2) crashed after step 3: DataLoader" in said
    assert "killed by signal: Killed" in said and "\n" not in said
    out = Path(config.output_dir)
    newest = checkpoint_folder.newest_checkpoint(out / CHECKPOINTS, pytest.fail)
    assert newest is not None and newest.step == (DONE if when == "step" else DONE - 1)
    assert not list(out.rglob(".*")), "what was being written is gone"
    train(config.with_changes(dataloader_workers=0), console=quiet(), resume=True)
    assert outcome(out) == alone


class Signal(TrainerCallback):
    """Sends a signal during a step: to the group of processes, as a terminal does, or to each."""

    def __init__(self, number: int, each: bool) -> None:
        self.number, self.each = number, each

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 != DONE:
            return
        workers = [process.pid for process in multiprocessing.active_children()]
        os.killpg(0, self.number)
        for pid in workers if self.each else ():
            os.kill(pid, self.number)


def run_with_a_signal(config: TrainConfig, number: int, each: bool) -> tuple[int, int | None]:
    os.setpgrp()
    result = train(config, console=quiet(), callbacks=[Signal(number, each)])
    nothing_can_raise()
    assert result.interrupted
    return len(result.history.steps), result.signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_the_group_stops_after_the_step(config: TrainConfig, number: int) -> None:
    assert in_own_process(run_with_a_signal, config, number, False) == (DONE, number)
    resumed = train(config.with_changes(dataloader_workers=0), console=quiet(), resume=True)
    assert [step["step"] for step in resumed.history.steps] == [1, 2, 3, 4, 5, 6]


def test_a_signal_to_every_process_stops_too(config: TrainConfig) -> None:
    """As a service manager sends SIGTERM; the step may be lost, what was saved is not."""
    done, number = in_own_process(run_with_a_signal, config, signal.SIGTERM, True)
    assert number == signal.SIGTERM and done in (DONE - 1, DONE)
    resumed = train(config.with_changes(dataloader_workers=0), console=quiet(), resume=True)
    assert [step["step"] for step in resumed.history.steps] == [1, 2, 3, 4, 5, 6]


def run_to_its_error(config: TrainConfig) -> tuple[str, str]:
    try:
        train(config, console=quiet())
    except Exception as error:
        nothing_can_raise()
        return type(error).__name__, str(error)
    raise AssertionError("it has found nothing")


def test_bad_data_in_a_worker_is_named_as_without_workers(config: TrainConfig) -> None:
    data = Path(config.train_data)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[-1] = {"query": "q", "target": "t", "documents": []}
    data.write_text("\n".join(map(json.dumps, rows)))
    changes = {"streaming": True, "heads": "auto", "head_criterion": "random"}
    found = [
        in_own_process(run_to_its_error, config.with_changes(dataloader_workers=count, **changes))
        for count in (1, 0)
    ]
    assert found[0] == found[1] and found[0][0] == "ValueError"
    assert "train.jsonl:24" in found[0][1] and "\n" not in found[0][1]
