"""Payloads that show that they were unpickled or run."""

from __future__ import annotations

from pathlib import Path


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)

    @property
    def went_off(self) -> bool:
        return self.trace.exists()
