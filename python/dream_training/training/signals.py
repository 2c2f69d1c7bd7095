"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, say how to resume."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dream_training.distributed import world

_STANDARD_ERROR = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(TrainerCallback):
    """Turns the first signal into a stop after the current step; a second one stops at once.

    Args:
        checkpoints: whether a checkpoint is written at the stop.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self, checkpoints: bool) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle the signals inside; outside the main thread Python does not allow that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: one that was not set from Python, and cannot be put back from there.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        text = f"\n{signal.Signals(number).name}: stopping after this step{again}\n"
        # Past Python's streams and the console: the signal may have come amid a line of theirs.
        with suppress(OSError):
            os.write(_STANDARD_ERROR, text.encode())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Whichever process was told to stop: all of them do, after the same step.
        if world.max_over_ranks(int(self.received is not None)):
            self.received = self.received or signal.SIGTERM
            control.should_save = self.checkpoints
            control.should_training_stop = True
