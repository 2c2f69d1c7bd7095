"""A long run takes no more memory, handles or time per step at its end than at its beginning."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from dream_training.training.driver import train
from helpers.soak_record import SOAK, record
from helpers.tiny import quiet

pytestmark = pytest.mark.long

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Watch(TrainerCallback):
    """Records what the process holds and spends at every step."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.handles: list[int] = []
        self.seconds: list[float] = []
        self.calls: list[int] = []
        self._begin = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # A clock is reliable in a long run only. Counts of calls are on any machine, but are slow.
        if not SOAK and state.global_step % 4 == 0:
            self.calls.append(0)
            sys.setprofile(self._count)
        self._begin = time.process_time()

    def _count(self, frame, event, argument) -> None:
        self.calls[-1] += 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        sys.setprofile(None)
        # CPU time, so that other processes do not count.
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

    def ratio(values: list) -> float:
        fifth = len(values) // 5
        return statistics.median(values[-fifth:]) / statistics.median(values[fifth : 2 * fifth])

    growth, slowdown = ratio(watch.memory), ratio(watch.seconds)
    more = max(watch.handles[last]) - max(watch.handles[first])
    record("long run", steps=steps, memory=round(growth, 4), time=round(slowdown, 3), handles=more)
    assert growth <= 1.01
    assert more <= 0
    assert (slowdown if SOAK else ratio(watch.calls)) <= 1.05
