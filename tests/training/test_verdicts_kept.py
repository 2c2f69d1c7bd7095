"""Within a run the reader is asked once about a pool that comes again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from dream_training.objectives import distilled_dream
from dream_training.objectives.verdicts import Verdicts
from dream_training.reading.verdict import judge
from dream_training.training.driver import train
from helpers.killed_run import outcome
from helpers.taught import teaching_config
from helpers.tiny import quiet


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries of every reading."""
    queries: list[str] = []

    def counted(reader, prefix, texts, targets):
        queries.extend(texts)
        return judge(reader, prefix, texts, targets)

    monkeypatch.setattr(distilled_dream, "judge", counted)
    return queries


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = control.should_save = state.global_step == self.step


def test_each_pool_is_read_once_in_a_run(tiny_model: Path, tmp_path: Path, asked) -> None:
    """Ten lines, three epochs of two batches: every line once, also those left out at first."""
    config = teaching_config(tiny_model, tmp_path, max_steps=8, output_dir=str(tmp_path / "run"))
    train(config, console=quiet())
    assert len(asked) == len(set(asked)) == 10
    first, asked[:] = outcome(tmp_path / "run"), []
    # A resumed run knows what was read before, and gives the same bits.
    resumed = config.with_changes(output_dir=str(tmp_path / "resumed"))
    train(resumed, callbacks=[StopAfter(4)], console=quiet())
    before = len(asked)
    train(resumed, resume=True, console=quiet())
    assert len(set(asked)) == len(asked) and 8 <= before <= 10
    assert outcome(tmp_path / "resumed") == first
    # What a batch has together changes with the batch: nothing is kept.
    asked[:] = []
    train(config.with_changes(pool="both"), overwrite=True, console=quiet())
    assert len(asked) == 32


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_what_is_kept_survives_a_checkpoint(dtype: torch.dtype) -> None:
    verdicts = Verdicts(shared=False)
    assert Verdicts(shared=False).state()["keys"] == []
    verdicts.put(["a", "b"], torch.tensor([[1 / 3, -2.0], [5.0, 0.0]], dtype=dtype), [2, 1])
    verdicts.count(3, 2)
    restored = Verdicts(shared=False)
    restored.restore(verdicts.state())
    assert torch.equal(restored.get(["b", "a"]), verdicts.get(["b", "a"]))
    assert restored.get(["a"]).dtype == dtype and restored.unknown(["a", "c"]) == [1]
    assert (restored.hits, restored.misses) == (3, 2)
