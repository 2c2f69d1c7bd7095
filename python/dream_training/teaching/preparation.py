"""What one process does before all teach: candidates, heads, the reader, and the manifest."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels import HeadFile, write_heads
from dream_kernels.files import whole_folder
from dream_kernels.head_file import read_heads
from dream_kernels.parsing import shortened
from dream_training.config import TrainConfig
from dream_training.data.jsonl import column_rows
from dream_training.data.taught_folder import (
    CANDIDATES,
    FORMAT,
    HEADS,
    MANIFEST,
    TaughtLines,
    batches_of,
    candidate_schema,
    digests_of,
    shares_pools,
    taught_lines,
    write_parquet,
)
from dream_training.data.training_row import TrainingRow
from dream_training.environment import describe_environment
from dream_training.json_file import read_json, write_json
from dream_training.objectives.verdicts import reader_identity
from dream_training.reading.loading import load_reader
from dream_training.teaching.candidates import (
    Line,
    given_rows,
    make_lines,
    missing_rows,
    pool_of,
)
from dream_training.teaching.options import Candidates
from dream_training.training.inputs import find_heads
from dream_training.training.taught import check_named_heads

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader

_STALE_SECONDS = 3600.0


class Preparation:
    """What one process does before all teach: candidates, heads, the reader's identity.

    Attributes:
        reader: where it was loaded here.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        wanted: Candidates,
        settings: dict[str, Any],
        append: bool,
    ) -> None:
        self.config, self.folder, self.wanted = config, folder, wanted
        self.settings, self.append = settings, append
        self.reader: Reader | None = None

    def prepare(self) -> None:
        """Check the folder against the config; add the lines that it lacks.

        Raises:
            ValueError: it was taught with other settings, by another reader or from other lines.
        """
        folder, lines = self.folder, taught_lines(self.folder)
        if not lines and folder.is_dir() and any(folder.glob("[!.]*")):
            raise FileExistsError(f"{folder} has other content; give an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        if lines:
            _check_settings(folder, lines[0], self.settings)
        rows = given_rows(self.config)
        missing = missing_rows(rows, self.config.data.train_positives, digests_of(lines))
        if lines and missing and not self.append:
            raise ValueError(
                f"{self.config.data.train_data} has {len(missing)} of {len(rows)} lines that "
                f"{folder} was not taught with, the first has the query "
                f"{shortened(missing[0].query)}: add them with --append, or choose another folder"
            )
        filled, mined = make_lines(self.config, missing, self.wanted, rows) if missing else ([], {})
        number = lines[-1].number + 1 if lines else 0
        if shares_pools(self.settings):
            for batch in batches_of(len(filled), self.settings, number):
                pool_of(self.config, [filled[i] for i in batch])  # a fault must show here
        heads = self._heads(lines, rows)
        self.reader = load_reader(
            self.config.reader, self.config.lengths, self.config.run, heads.by_layer()
        )
        identity = reader_identity(self.reader)
        if lines:
            _check_identity(folder, lines[0], identity, self.config.reader.model)
        if filled:
            self._write(number, filled, heads, {"identity": identity, "mined": mined})

    def _heads(self, lines: Sequence[TaughtLines], rows: Sequence[TrainingRow]) -> HeadFile:
        """The folder's heads, or those that the config names: read, or selected on the lines."""
        named = self.config.heads.file != "auto"
        if not lines:
            from datasets import Dataset

            positives = self.config.data.train_positives
            # As training would select them, before candidates are added.
            data = Dataset.from_list([line for row in rows for line in column_rows(row, positives)])
            return find_heads(self.config, data).choose(self.config.heads.top_k)
        taught, top_k = read_heads(lines[0].path / HEADS), self.config.heads.top_k
        if not named and top_k not in (None, taught.chosen):
            raise ValueError(
                f"top_k is {top_k}, and {self.folder} was taught with {taught.chosen} heads: leave "
                "it out, or choose another folder"
            )
        advice = "give that head file, or another folder"
        check_named_heads(self.config, lines[0], str(self.folder), advice)
        return taught

    def _write(
        self, number: int, filled: list[Line], heads: HeadFile, found: dict[str, Any]
    ) -> None:
        """Write lines and manifest; if another process was faster, its files stay.

        Raises:
            ValueError: they are those of other lines.
        """
        environment = describe_environment(self.config.run.device or "cpu")
        manifest = {
            "format": FORMAT,
            "lines": len(filled),
            "settings": self.settings,
            "heads": {str(layer): own for layer, own in heads.by_layer().items()},
            "reader": self.config.reader.model,
            "digest": _digest(filled),
            "train_data": self.config.data.train_data,
            "corpus": self.wanted.corpus,
            "retriever": self.config.retriever.model if self.wanted.retriever else None,
            "environment": environment,
            **found,
            "date": datetime.date.today().isoformat(),
        }
        path = self.folder / f"lines-{number:05d}"
        with whole_folder(path, replace=False) as new:
            write_parquet(new / CANDIDATES, filled, candidate_schema())
            write_heads(new / HEADS, heads)
            write_json(new / MANIFEST, manifest)
        if read_json(path / MANIFEST).get("digest") != manifest["digest"]:
            raise ValueError(
                f"{path} was written by another process meanwhile, for other lines: start again"
            )


def _remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left an hour ago or more; others may be writing now."""
    for path in folder.glob(".*.dream.tmp"):
        if path.exists() and path.stat().st_mtime < time.time() - _STALE_SECONDS:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _digest(filled: Sequence[Line]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in filled:
        digest.update(json.dumps([line["digest"], line["documents"]]).encode())
    return digest.hexdigest()


def _check_settings(folder: Path, lines: TaughtLines, settings: dict[str, Any]) -> None:
    taught = lines.settings
    for key in {**settings, **taught}:
        if taught.get(key) != settings.get(key):
            raise ValueError(
                f"{key} is {settings.get(key)!r}, and {folder} was taught with "
                f"{taught.get(key)!r}: resume with that value, or choose another folder"
            )


def _check_identity(folder: Path, lines: TaughtLines, identity: str, name: str) -> None:
    if identity != lines.manifest["identity"]:
        raise ValueError(
            f"reader {name} is not the one that {folder} was taught by, "
            f"{lines.manifest['reader']}: its weights, their type or its prompt differ; resume "
            "with that one, or choose another folder"
        )
