"""The engines that train in several processes, as the trainer's arguments."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.config import TrainConfig

_LAYERS = "transformer_layer_cls_to_wrap"


def engine_arguments(config: TrainConfig, model: SentenceTransformer) -> dict[str, Any]:
    """Return the trainer's arguments that choose the engine; DDP where nothing is chosen.

    ``accelerate launch`` may choose it instead, by its own options or file. For both the layers of
    the retriever become the units of FSDP2: sentence-transformers does not name them, and without
    them all weights would be fetched at once.

    Args:
        config: the run.
        model: the retriever.

    Raises:
        ValueError: the engine cannot do what the config asks for.
    """
    layers = sorted(_layer_classes(model))
    if _flag("ACCELERATE_USE_FSDP") and layers:
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(layers))
    arguments: dict[str, Any] = {"ddp_timeout": int(config.distributed_timeout)}
    if config.fsdp:
        arguments["fsdp"] = "full_shard auto_wrap"
        arguments["fsdp_config"] = _fsdp_config(config, layers)
    if config.deepspeed is not None:
        arguments["deepspeed"] = config.deepspeed
    if config.learnable_temperature and (config.fsdp or _flag("ACCELERATE_USE_FSDP")):
        raise ValueError(
            "learnable_temperature must be false with FSDP, which takes only the retriever's own "
            "parameters: use DDP or ZeRO-2"
        )
    return arguments


def _fsdp_config(config: TrainConfig, layers: list[str]) -> dict[str, Any]:
    given = config.fsdp_config or {}
    if isinstance(given, str):
        with open(given, encoding="utf-8") as file:
            given = json.load(file)
    # Both spellings of a key are the trainer's.
    given = {key.removeprefix("fsdp_"): value for key, value in given.items()}
    if int(given.get("version", 2)) != 2:
        raise ValueError(
            f"fsdp_config must have version 2, got {given['version']}: FSDP1 flattens frozen and "
            "trained parameters together"
        )
    chosen: dict[str, Any] = {"version": 2, "reshard_after_forward": True}
    if layers:
        chosen[_LAYERS] = layers
    return {**chosen, **given}


def _layer_classes(model: SentenceTransformer) -> set[str]:
    """The classes of the retriever's layers, as its language model names them."""
    present = {type(module).__name__ for module in model.modules()}
    named: set[str] = set()
    for module in model.modules():
        named |= set(getattr(module, "_no_split_modules", None) or ())
    return named & present


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
