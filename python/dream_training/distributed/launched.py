"""The number of processes that were launched, read without torch."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes ``torchrun`` or ``accelerate launch`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(command: str) -> None:
    """Raise ``ValueError`` if a launcher has started several processes of a command for one."""
    if launched() > 1:
        raise ValueError(
            "only dream train and dream teach run in several processes, got "
            f"{launched()} for {command!r}"
        )
