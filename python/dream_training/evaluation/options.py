"""How retrievers are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class EvaluationOptions:
    """How tasks are evaluated.

    Attributes:
        split: ``qrels/<split>.tsv`` of BEIR folders and sets; mteb's tasks name their own.
        batch_size: texts encoded at once.
        query_max_len: tokens of a query; the model's own limit by default.
        passage_max_len: tokens of a document; likewise.
        devices: one process for each of these devices; None for this process alone.
        cache_dir: where sets of BEIR are kept.
        keep_identical_ids: see :class:`~dream_training.evaluation.retrieval.RetrievalTask`; mteb's
            tasks decide for themselves unless it is set.
    """

    split: str = "test"
    batch_size: int = 32
    query_max_len: int | None = None
    passage_max_len: int | None = None
    devices: Sequence[str] | None = None
    cache_dir: Path | None = None
    keep_identical_ids: bool = False


def choose_devices(processes: int | None, devices: str) -> list[str] | None:
    """Return one device for each process: those named, or what there is.

    Args:
        processes: how many; None or 1 for this process alone, unless devices are named.
        devices: separated by commas.

    Raises:
        ValueError: both were given, or fewer GPUs are there than processes.
    """
    named = [device.strip() for device in devices.split(",") if device.strip()]
    if named and processes:
        raise ValueError("give --processes or --devices, not both")
    if named:
        return [str(torch.device(device)) for device in named]
    if processes is None or processes == 1:
        return None
    if not torch.cuda.is_available():
        return ["cpu"] * processes
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"processes must be at most {torch.cuda.device_count()}, one for each GPU, got "
            f"{processes}"
        )
    return [f"cuda:{i}" for i in range(processes)]
