"""The engines that train in several processes, as the trainer's arguments."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_training.config import TrainConfig


def engine_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the trainer's arguments that choose the engine; DDP where nothing is chosen.

    ``accelerate launch`` may choose it instead, by its own options or file.

    Raises:
        ValueError: the engine cannot do what the config asks for.
    """
    arguments: dict[str, Any] = {"ddp_timeout": int(config.distributed_timeout)}
    if config.fsdp:
        arguments["fsdp"] = "full_shard auto_wrap"
        arguments["fsdp_config"] = _fsdp_config(config)
    if config.deepspeed is not None:
        arguments["deepspeed"] = config.deepspeed
    launched_with_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if config.learnable_temperature and (config.fsdp or launched_with_fsdp):
        raise ValueError(
            "learnable_temperature must be false with FSDP, which takes only the retriever's own "
            "parameters: use DDP or ZeRO-2"
        )
    return arguments


def check_trainer(config: TrainConfig, trainer: Any) -> None:
    """Check that the engine that a config names is the one that trains.

    Raises:
        ValueError: it is not, for instance because the run is on CPUs.
    """
    for name, wanted, got in (
        ("fsdp", config.fsdp, trainer.is_fsdp_enabled),
        ("deepspeed", config.deepspeed is not None, trainer.is_deepspeed_enabled),
    ):
        if wanted and not got:
            raise ValueError(
                f"{name} needs torchrun or accelerate launch, and GPUs: elsewhere accelerate "
                f"trains without it, here on {trainer.args.device}"
            )


def _fsdp_config(config: TrainConfig) -> dict[str, Any]:
    given = config.fsdp_config or {}
    if isinstance(given, str):
        with open(given, encoding="utf-8") as file:
            given = json.load(file)
    # Both spellings of a key are the trainer's.
    given = {key.removeprefix("fsdp_"): value for key, value in given.items()}
    return {"version": 2, "reshard_after_forward": True, **given}
