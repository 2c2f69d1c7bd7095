"""A long run takes no more memory, handles or time per step at its end than at its beginning."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import pytest
from tiny import quiet
from transformers import TrainerCallback

from dream_training.training.driver import train
from soak_record import SOAK, record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Watch(TrainerCallback):
    """Notes what the process holds and spends, step by step."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.handles: list[int] = []
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._begin = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # Of the processor, for other processes shall not count.
        self.seconds.append(time.process_time() - self._begin)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.handles.append(len(os.listdir("/proc/self/fd")))


def test_nothing_grows(run) -> None:
    steps = 2000 if SOAK else 120
    watch = Watch()
    config = run(
        max_steps=steps,
        save_steps=steps // 10,
        eval_steps=steps // 5,
        document_store="memory",
        report_queries=0,
    )
    train(config, console=quiet(), callbacks=[watch])
    part = steps // 5
    first, last = slice(part, 2 * part), slice(-part, None)
    growth = statistics.median(watch.memory[last]) / statistics.median(watch.memory[first])
    slowdown = statistics.median(watch.seconds[last]) / statistics.median(watch.seconds[first])
    more = max(watch.handles[last]) - max(watch.handles[first])
    record("long run", steps=steps, memory=round(growth, 4), time=round(slowdown, 3), handles=more)
    assert growth <= 1.01
    assert more <= 0
    # The clock of a short run on a busy machine is not good for more.
    assert slowdown <= (1.05 if SOAK else 1.3)
