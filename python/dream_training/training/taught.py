"""Whether a folder of ``dream teach`` is what a config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dream_kernels.head_file import read_chosen_heads
from dream_kernels.parsing import shortened
from dream_training.choices import NO_READER
from dream_training.data.jsonl import read_training_data
from dream_training.data.taught_folder import TaughtLines, digests_of, line_digest, taught_lines

if TYPE_CHECKING:
    from dream_training.config import TrainConfig

# How the reader reads; compared where the config names a reader.
READING = ("context", "mode", "document_mass", "injected_rows", "reader_prompt", "target_max_len")


def check_taught(config: TrainConfig) -> None:
    """Raise unless a config's ``taught`` goes with what else it names; pass where it has none.

    Raises:
        ValueError: the folder has pools of another kind, or was taught by another reader, with
            other heads or from other lines.
    """
    folder = config.data.taught
    if folder is None:
        return
    lines = taught_lines(folder)
    first = lines[0]
    _check_pools(config, first)
    if config.reader.model != NO_READER:
        _check_reader(config, first)
    check_named_heads(config, first, f"taught {folder}", "teach again, or leave heads out")
    if Path(config.data.train_data).resolve() != Path(folder).resolve():
        _check_lines(config, lines)


def check_named_heads(config: TrainConfig, lines: TaughtLines, folder: str, advice: str) -> None:
    """Raise unless lines were taught with the heads of the config's file; pass where it has none.

    Args:
        config: the run.
        lines: of a folder.
        folder: its name in the message.
        advice: the end of the message.

    Raises:
        ValueError: they were taught with other heads.
    """
    if config.heads.file == "auto":
        return
    wanted = read_chosen_heads(config.heads.file, config.heads.top_k).by_layer()
    if wanted != lines.heads:
        raise ValueError(
            f"heads {config.heads.file} are {wanted}, and {folder} was taught with {lines.heads}: "
            f"{advice}"
        )


def _check_pools(config: TrainConfig, lines: TaughtLines) -> None:
    taught, folder = lines.settings, config.data.taught
    wanted = {
        "pool": config.pools.pool,
        "documents_per_query": config.pools.documents_per_query,
    }
    if lines.shared:
        wanted["batch_size"] = config.optimisation.batch_size
    for key, value in wanted.items():
        if value != taught.get(key):
            raise ValueError(
                f"{key} is {value!r}, and taught {folder} was taught with {taught.get(key)!r}: set "
                f"{key}={_written(taught.get(key))}, or teach again"
            )


def _check_reader(config: TrainConfig, lines: TaughtLines) -> None:
    folder, taught, flat = config.data.taught, lines.settings, config.flat()
    name = lines.manifest["reader"]
    if Path(config.reader.model).name != Path(name).name:
        raise ValueError(
            f"reader is {config.reader.model}, and taught {folder} was taught by {name}: name that "
            f"one, or leave reader out"
        )
    for key in READING:
        if flat[key] != taught.get(key):
            raise ValueError(
                f"{key} is {flat[key]!r}, and taught {folder} was taught with "
                f"{taught.get(key)!r}: set {key}={_written(taught.get(key))}, or leave reader out"
            )


def _check_lines(config: TrainConfig, lines: list[TaughtLines]) -> None:
    data = config.data
    known = digests_of(lines)
    given = read_training_data(
        data.train_data,
        split=data.train_split,
        target_from=data.target_from,
        positives=data.train_positives,
    )
    unknown = [row for row in given if line_digest(row) not in known]
    if unknown:
        raise ValueError(
            f"train_data {data.train_data} has {len(unknown)} of {len(given)} lines that taught "
            f"{data.taught} was not taught with, the first has the query "
            f"{shortened(unknown[0]['query'])}: add them with dream teach --append, or leave "
            "train_data out"
        )


def _written(value: object) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(value)
