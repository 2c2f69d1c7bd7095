"""Resuming from a checkpoint: which one, and whether it belongs to this run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_training.checkpointing.folder import (
    Checkpoint,
    add_file,
    newest_checkpoint,
)
from dream_training.config import TrainConfig
from dream_training.console import tracked
from dream_training.distributed import world
from dream_training.objectives.embedding import draws_random_numbers
from dream_training.training.output_folder import CHECKPOINTS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer

# Keys of the config that may change between a checkpoint and the run that resumes from it;
# mini_batch_size only if the retriever has no dropout.
_MAY_CHANGE = frozenset(
    {
        *("output_dir", "log_steps", "eval_steps", "save_steps", "keep_checkpoints"),
        *("final_tasks", "max_steps", "max_skipped_steps", "mini_batch_size", "device"),
        *("dataloader_workers", "document_store_gb", "distributed_timeout"),
    }
)
# Rows of a large data set that its digest looks at.
_ROWS = 10_000


def identity_of(config: TrainConfig, data: Dataset | IterableDataset) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes from it."""
    return {
        "config": config.flat(),
        "data": data_digest(config.data.train_data, data),
        "processes": world.size(),
    }


def data_digest(train_data: str, data: Dataset | IterableDataset) -> str:
    """Return a digest of training data: of its rows, or of 10,000 evenly spaced ones.

    A file is digested as a whole, and a stream that is not a file by its name alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    path = Path(train_data)
    if path.is_file():
        add_file(digest, path)
    if hasattr(data, "__len__"):
        count = len(data)
        digest.update(str(count).encode())
        rows = range(0, count, max(1, count // _ROWS))
        for i in tracked(rows, "digesting the training data", len(rows)):
            digest.update(json.dumps(data[i], sort_keys=True, default=str).encode())
    else:
        digest.update(train_data.encode())
    return digest.hexdigest()


def find_checkpoint(folder: Path, console: Console) -> Checkpoint | None:
    """Return the newest intact checkpoint, and print which ones are refused and why."""

    def refuse(reason: str) -> None:
        console.print(f"refused: {reason}")

    checkpoint = newest_checkpoint(folder, refuse)
    if checkpoint is None:
        console.print(f"no checkpoint in {folder}: starting at the first step")
    else:
        console.print(f"resuming after step {checkpoint.step} from {checkpoint.path}")
    return checkpoint


def has_checkpoint_of(config: TrainConfig) -> bool:
    """Whether ``output_dir`` has a checkpoint that was written with this config."""
    checkpoint = newest_checkpoint(
        Path(config.output.output_dir) / CHECKPOINTS, lambda reason: None
    )
    if checkpoint is None or checkpoint.step > config.optimisation.max_steps:
        return False
    return not _differing(checkpoint.document("run")["config"], config.flat())


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint is one of the run of this :func:`identity_of`.

    Raises:
        ValueError: a config key that decides the result differs, or the training data, or the
            checkpoint has more steps than the run.
    """
    kept, config = checkpoint.document("run"), identity["config"]
    for key, (before, now) in _differing(kept["config"], config).items():
        raise ValueError(
            f"{key} is {now!r}, and {checkpoint.path} was written with {before!r}: resume with "
            "that value, or start a new run in another output_dir"
        )
    if kept["processes"] != identity["processes"]:
        raise ValueError(
            f"{checkpoint.path} was written by {kept['processes']} processes, and these are "
            f"{identity['processes']}: launch the same number"
        )
    if kept["data"] != identity["data"]:
        raise ValueError(
            f"train_data {config['train_data']} has changed since {checkpoint.path} was written: "
            "restore the old data, or start a new run in another output_dir"
        )
    if checkpoint.step > config["max_steps"]:
        raise ValueError(
            f"max_steps must be at least {checkpoint.step}, the step of {checkpoint.path}, "
            f"got {config['max_steps']}"
        )


def check_mini_batches(
    checkpoint: Checkpoint, mini_batch_size: int | None, model: SentenceTransformer
) -> None:
    """Raise if mini-batches of another size would draw other dropout masks.

    Raises:
        ValueError: ``mini_batch_size`` differs from that of a checkpoint, and the retriever draws
            random numbers.
    """
    before = checkpoint.document("run")["config"].get("mini_batch_size")
    if before != mini_batch_size and draws_random_numbers(model):
        raise ValueError(
            f"mini_batch_size is {mini_batch_size!r}, and {checkpoint.path} was written "
            f"with {before!r}: the retriever has dropout, whose masks depend on it. Resume "
            "with that value, or start a new run in another output_dir"
        )


def _differing(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values, in a checkpoint and now, of keys that decide a run and differ."""
    now = json.loads(json.dumps(config))
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(now.keys() | before.keys())
        if key not in _MAY_CHANGE and now.get(key) != before.get(key)
    }
