"""The engines that train in several processes, as the trainer's arguments."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_training.config_groups import DistributionConfig


def engine_arguments(distribution: DistributionConfig) -> dict[str, Any]:
    """Return the trainer's arguments that choose the engine; DDP by default.

    ``accelerate launch`` may choose it instead, by its own options or file.
    """
    arguments: dict[str, Any] = {"ddp_timeout": int(distribution.distributed_timeout)}
    if distribution.fsdp:
        arguments["fsdp"] = "full_shard auto_wrap"
        arguments["fsdp_config"] = settings = _fsdp_config(distribution)
        # transformers 4.57 passes neither on, and accelerate would take FSDP1.
        os.environ["FSDP_VERSION"] = str(settings["version"])
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(settings["reshard_after_forward"]).lower()
    if distribution.deepspeed is not None:
        arguments["deepspeed"] = distribution.deepspeed
    return arguments


def check_trainer(
    distribution: DistributionConfig, trainer: Any, learnable_temperature: bool
) -> None:
    """Check that the engine that a config names is the one that trains, and can train it.

    Raises:
        ValueError: it is not, for instance because the run is on CPUs; or it cannot.
    """
    for name, wanted, got in (
        ("fsdp", distribution.fsdp, trainer.is_fsdp_enabled),
        ("deepspeed", distribution.deepspeed is not None, trainer.is_deepspeed_enabled),
    ):
        if wanted and not got:
            raise ValueError(
                f"{name} needs torchrun or accelerate launch, and GPUs: elsewhere accelerate "
                f"trains without it, here on {trainer.args.device}"
            )
    if learnable_temperature and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "learnable_temperature must be false with FSDP and DeepSpeed, which take no parameters "
            "but the retriever's own: use DDP"
        )


def _fsdp_config(distribution: DistributionConfig) -> dict[str, Any]:
    given = distribution.fsdp_config or {}
    if isinstance(given, str):
        with open(given, encoding="utf-8") as file:
            given = json.load(file)
    # The trainer accepts both spellings of a key.
    given = {key.removeprefix("fsdp_"): value for key, value in given.items()}
    return {"version": 2, "reshard_after_forward": True, **given}
