"""What a launcher says, and the choice of an engine, checked without torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dream_training.config import TrainConfig

READER_SHARDINGS = ("replicated", "sharded")


def launched() -> int:
    """How many processes ``torchrun`` or ``accelerate launch`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_engine(config: TrainConfig) -> None:
    """Check the keys of a config that choose an engine.

    Raises:
        ValueError: two engines are chosen, or a choice lacks what it needs.
    """
    if config.fsdp and config.deepspeed is not None:
        raise ValueError("fsdp and deepspeed must not both be set: they are two engines")
    if config.fsdp_config is not None and not config.fsdp:
        raise ValueError("fsdp_config must be null unless fsdp is true")
    if not config.distributed_timeout > 0:
        raise ValueError(f"distributed_timeout must be positive, got {config.distributed_timeout}")
    if config.gather_across_devices and config.pool == "mined":
        raise ValueError(
            "gather_across_devices must be false with pool 'mined': each query has its own "
            "candidates, and would get no other"
        )


def refuse_several(command: str) -> None:
    """Raise ``ValueError`` where a launcher has started several processes of a command for one."""
    if launched() > 1:
        raise ValueError(
            f"only dream train runs in several processes, got {launched()} for {command!r}"
        )
