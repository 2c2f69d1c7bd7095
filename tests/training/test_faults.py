"""What goes wrong during a run: bad numbers, full disks, too little memory, crashed processes."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from dream_kernels import files
from dream_training import memory
from dream_training.checkpointing import folder as checkpoint_folder
from dream_training.config import TrainConfig
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.preflight import retriever_checks
from dream_training.preflight.check import OK
from dream_training.training import faults
from dream_training.training.driver import train
from dream_training.training.faults import MemoryWatch, memory_advice
from dream_training.training.resuming import CHECKPOINTS
from dream_training.training.signals import StopSignals
from helpers.own_process import in_own_process
from helpers.soak_record import record
from helpers.tiny import quiet


def words(console: Console) -> str:
    return " ".join(console.file.getvalue().split())


@pytest.fixture
def broken_steps(monkeypatch):
    """Set the loss of chosen steps, or its gradient, to given values."""

    def install(steps: dict[int, float], gradient_only: bool = False) -> None:
        original, calls = DistilledDreamLoss.forward, []

        def forward(self, *args, **kwargs):
            loss = original(self, *args, **kwargs)
            calls.append(1)
            factor = steps.get(len(calls))
            if factor is None:
                return loss
            if gradient_only:
                loss.register_hook(lambda gradient: gradient * factor)
                return loss
            return loss * factor

        monkeypatch.setattr(DistilledDreamLoss, "forward", forward)

    return install


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gradient_only", [False, True])
def test_bad_steps_are_skipped_and_counted(
    run, tmp_path: Path, broken_steps, value: float, gradient_only: bool
) -> None:
    broken_steps({2: value}, gradient_only)
    console = quiet()
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            weights.append(torch.cat([w.flatten() for w in trained]))

    result = train(run(eval_data=None), console=console, callbacks=[Watch()])
    first, second, third, _ = weights
    assert torch.equal(first, second), "a skipped step leaves the weights alone"
    assert not torch.equal(second, third) and bool(third.isfinite().all())
    steps = result.history.steps
    assert "loss" not in steps[1] and steps[1]["skipped"] == 1
    assert all(math.isfinite(s["loss"]) for i, s in enumerate(steps) if i != 1)
    assert "step 2 skipped" in words(console) and "step 2/4 skipped" in words(console)
    assert json.loads((tmp_path / "out" / "history.json").read_text())["steps"][1]["skipped"] == 1
    assert (tmp_path / "out" / "curve.png").stat().st_size > 0


def test_the_batch_of_a_skipped_step_trains_again(run, tmp_path: Path, broken_steps) -> None:
    batches = []

    class Spy(TrainerCallback):
        def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
            batches.append(state.global_step)

    broken_steps({3: math.nan})
    train(run(eval_data=None), console=quiet(), callbacks=[Spy()])
    saved = tmp_path / "out" / "faults" / "step-3.jsonl"
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["documents"]) == 4 for row in rows)
    assert [row["documents"][row["positive"]].split()[1] for row in rows] == [
        row["query"].split()[3] for row in rows
    ]
    again = run(train_data=str(saved), max_steps=1, eval_data=None, output_dir=str(tmp_path / "r"))
    assert math.isfinite(train(again, console=quiet()).history.steps[0]["loss"])


def test_too_many_bad_steps_end_the_run(run, tmp_path: Path, broken_steps) -> None:
    broken_steps(dict.fromkeys((2, 3, 4), math.nan))
    config = run(eval_data=None, save_steps=1, max_steps=6, max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match=r"3 steps .* max_skipped_steps is 2.*faults"):
        train(config, console=quiet())
    assert len(list((tmp_path / "out" / "faults").iterdir())) == 3
    # The count is resumed with the run: the fourth step is taken again.
    result = train(config, console=quiet(), resume=True)
    assert [s["step"] for s in result.history.steps] == [1, 2, 3, 4, 5, 6]
    assert [s.get("skipped") for s in result.history.steps] == [None, 1, 1, None, None, None]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(run, tmp_path: Path, monkeypatch) -> None:
    original = files.to_disk

    def to_disk(path: Path) -> None:
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        original(path)

    monkeypatch.setattr(files, "to_disk", to_disk)
    console = quiet()
    result = train(run(save_steps=1, eval_data=None), console=console)
    assert len(result.history.steps) == 4
    assert "The checkpoint of step 2 could not be written" in words(console)
    assert "No space left on device" in words(console)
    assert "the newest is that of step 1" in words(console)
    kept = checkpoint_folder.newest_checkpoint(tmp_path / "out" / CHECKPOINTS, pytest.fail)
    assert kept is not None and kept.step == 4
    record("faults injected", kind="full disk", survived=1)


def test_a_folder_that_cannot_be_written_is_named_at_once(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", Path("/proc/self/dream")):
        with pytest.raises(OSError, match=f"output_dir {place} cannot be written"):
            train(run(output_dir=str(place)), console=quiet())


def test_a_file_that_ends_mid_line_is_named(run) -> None:
    data = Path(run().train_data)
    data.write_text(data.read_text()[:-20])
    with pytest.raises(ValueError, match=r"train.jsonl:24: .*ends in the middle of the line"):
        train(run(), console=quiet())


def test_a_stream_whose_file_changes_is_named(run) -> None:
    data = Path(run().train_data)

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                data.write_text(data.read_text().replace("apple", "pears"))
                os.utime(data, ns=(1, 1))

    with pytest.raises(ValueError, match="the file changed while it was read"):
        train(
            run(streaming=True, max_steps=20, eval_data=None),
            console=quiet(),
            callbacks=[Change()],
        )


def test_too_little_memory_says_what_to_lower(run, monkeypatch) -> None:
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(DistilledDreamLoss, "forward", forward)
    monkeypatch.setattr(MemoryWatch, "capacity", lambda self: 8 * 2**30)
    monkeypatch.setattr(MemoryWatch, "highest", lambda self: 7 * 2**30)
    monkeypatch.setattr(faults, "used_memory", lambda device: 3 * 2**30)
    with pytest.raises(MemoryError) as error:
        train(run(batch_size=8, documents_per_query=9, eval_data=None), console=quiet())
    text = str(error.value)
    # 7 + 2 GiB were needed, 3 of them before: a step may take 0.9 * 5 of its 6, which did not fit
    # however, so half.
    figures = "9.00 GiB were needed, 3.00 of them before the step, and the device has 8.00"
    assert f"in step 1: {figures}" in text
    assert "mini_batch_size=40 (now all, at least 80 texts): changes no result" in text
    assert "documents_per_query=4 (now 9)" in text and "batch_size=4 (now 8)" in text


def test_memory_advice_follows_the_measurement(run) -> None:
    watch = MemoryWatch(torch.device("cpu"))
    watch.resting = 2 * 2**30
    watch.capacity = lambda: 6 * 2**30  # type: ignore[method-assign]
    watch.highest = lambda: 18 * 2**30  # type: ignore[method-assign]
    config = run(batch_size=32, mini_batch_size=100, document_store="memory")
    text = memory_advice(MemoryError(), config, watch, 7)
    # 0.9 * (6 - 2) of 18 - 2: 0.225.
    assert "mini_batch_size=22 (now 100)" in text and "batch_size=7 (now 32)" in text
    assert "document_store_gb, now 2, of the 2.00 GiB" in text


def test_allocation_errors_are_parsed() -> None:
    assert faults._asked(RuntimeError("Tried to allocate 1.50 GiB")) == int(1.5 * 2**30)
    cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
    assert faults._asked(RuntimeError(cpu)) == 4096
    assert faults.is_out_of_memory(RuntimeError(cpu))
    assert faults.is_out_of_memory(MemoryError()) and not faults.is_out_of_memory(ValueError())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_knows_its_memory() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    watch.on_step_begin(None, None, None)  # type: ignore[arg-type]
    # Linux counts the peak in batches of pages: it may lag a little.
    assert 2**26 < watch.resting <= 1.1 * watch.highest() <= watch.capacity()


def test_a_system_that_reports_no_memory_is_no_obstacle(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: importing it fails
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / "absent")
    config = run(eval_data=None)
    history = train(config, console=quiet()).history
    assert [step["step"] for step in history.steps] == [1, 2, 3, 4]
    watch = MemoryWatch(torch.device("cpu"))
    watch.on_step_begin(None, None, None)  # type: ignore[arg-type]
    assert (watch.resting, watch.highest(), watch.capacity()) == (0, 0, 0)
    text = memory_advice(MemoryError(), config, watch, 7)
    assert text.startswith("out of memory in step 7. To lower, in this order:")
    assert "batch_size=2 (now 4)" in text and "GiB" not in text
    check = retriever_checks._of_cost(SimpleNamespace(config=config), history)
    assert check.status == OK and "memory" not in check.figure


def stop_twice(config: TrainConfig) -> tuple[int, bool, str]:
    """Steps done, whether the handler is the previous one, and what was printed."""
    original, calls = DistilledDreamLoss.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    DistilledDreamLoss.forward = forward
    console, before = quiet(), signal.getsignal(signal.SIGINT)
    result = train(config, console=console)
    assert result.interrupted
    return len(result.history.steps), signal.getsignal(signal.SIGINT) is before, words(console)


def test_a_second_signal_stops_at_once(run) -> None:
    steps, as_before, printed = in_own_process(stop_twice, run(save_steps=1, eval_data=None))
    assert steps == 2 and as_before
    assert "--resume continues after step 2" in printed


def test_the_first_signal_says_what_a_second_one_does(capfd) -> None:
    signals = StopSignals(checkpoints=True)
    signals._receive(signal.SIGINT, None)
    assert "SIGINT: stopping after this step; Ctrl-C again stops at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signals._receive(signal.SIGINT, None)
