"""What is built on the operator: reader, heads, data, objectives, training, evaluation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_training.collator import DreamCollator
    from dream_training.config import TrainConfig, load_config
    from dream_training.heads import HeadExample, select_heads
    from dream_training.losses import DreamLoss
    from dream_training.prompts import ReaderPrompt
    from dream_training.reader import Reader
    from dream_training.retriever import build_retriever, save_retriever
    from dream_training.training import train

# Imported when first used, so that `dream --help` need not wait for torch.
_HOMES = {
    "DreamCollator": "collator",
    "DreamLoss": "losses",
    "HeadExample": "heads",
    "Reader": "reader",
    "ReaderPrompt": "prompts",
    "TrainConfig": "config",
    "build_retriever": "retriever",
    "load_config": "config",
    "save_retriever": "retriever",
    "select_heads": "heads",
    "train": "training",
}

__all__ = [
    "DreamCollator",
    "DreamLoss",
    "HeadExample",
    "Reader",
    "ReaderPrompt",
    "TrainConfig",
    "build_retriever",
    "load_config",
    "save_retriever",
    "select_heads",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
