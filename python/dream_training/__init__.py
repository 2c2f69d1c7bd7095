"""What is built on the operator: reader, heads, data, objectives, training, evaluation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_training.config import TrainConfig, load_config
    from dream_training.data.taught_folder import read_taught
    from dream_training.heads.selection import HeadExample, select_heads
    from dream_training.models.retriever import build_retriever, save_retriever
    from dream_training.objectives.collator import DreamCollator
    from dream_training.objectives.distillation import EmdrLoss, ReplugLoss
    from dream_training.objectives.distilled_dream import DistilledDreamLoss
    from dream_training.objectives.dream import DreamLoss
    from dream_training.objectives.infonce import PoolInfoNCELoss
    from dream_training.objectives.revela import RevelaLoss
    from dream_training.objectives.taught import TaughtCollator, TaughtDreamLoss
    from dream_training.reading.prompts import ReaderPrompt
    from dream_training.reading.reader import Reader
    from dream_training.teaching.teach import teach
    from dream_training.training.driver import train

# Imported when first used, so that `dream --help` need not wait for torch.
_HOMES = {
    "DistilledDreamLoss": "objectives.distilled_dream",
    "DreamCollator": "objectives.collator",
    "DreamLoss": "objectives.dream",
    "EmdrLoss": "objectives.distillation",
    "HeadExample": "heads.selection",
    "PoolInfoNCELoss": "objectives.infonce",
    "Reader": "reading.reader",
    "ReaderPrompt": "reading.prompts",
    "ReplugLoss": "objectives.distillation",
    "RevelaLoss": "objectives.revela",
    "TaughtCollator": "objectives.taught",
    "TaughtDreamLoss": "objectives.taught",
    "TrainConfig": "config",
    "build_retriever": "models.retriever",
    "load_config": "config",
    "read_taught": "data.taught_folder",
    "save_retriever": "models.retriever",
    "select_heads": "heads.selection",
    "teach": "teaching.teach",
    "train": "training.driver",
}

__all__ = [
    "DistilledDreamLoss",
    "DreamCollator",
    "DreamLoss",
    "EmdrLoss",
    "HeadExample",
    "PoolInfoNCELoss",
    "Reader",
    "ReaderPrompt",
    "ReplugLoss",
    "RevelaLoss",
    "TaughtCollator",
    "TaughtDreamLoss",
    "TrainConfig",
    "build_retriever",
    "load_config",
    "read_taught",
    "save_retriever",
    "select_heads",
    "teach",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
