"""``dream teach``: the reader's verdict on every line, computed once and written."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_kernels import HeadFile, write_heads
from dream_kernels.files import is_stream, whole_folder
from dream_kernels.head_file import read_chosen_heads, read_heads
from dream_kernels.parsing import shortened
from dream_training.choices import MEMORY
from dream_training.config import TrainConfig
from dream_training.console import Work, make_console, progress, show_on, shows_progress
from dream_training.data.taught_folder import (
    BATCH,
    CANDIDATES,
    FORMAT,
    HEADS,
    MANIFEST,
    Part,
    TaughtLines,
    absent_parts,
    candidate_schema,
    digests_of,
    taught_lines,
    verdict_schema,
    write_parquet,
)
from dream_training.data.taught_statistics import is_flat
from dream_training.distributed import world
from dream_training.distributed.launched import launched
from dream_training.environment import describe_environment
from dream_training.json_file import write_json
from dream_training.models.loading import check_models
from dream_training.objectives.pools import build_pools, choose_candidates
from dream_training.objectives.verdicts import reader_identity
from dream_training.reading.loading import load_reader
from dream_training.reading.verdict import judge
from dream_training.teaching.candidates import Line, given_rows, make_lines, missing_rows
from dream_training.teaching.options import Candidates, Shard, check_config, settings_of
from dream_training.training.inputs import find_heads

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader

LINES_PER_FILE = 256
_STALE_SECONDS = 3600.0


@dataclass
class TeachResult:
    """What a process has taught.

    Attributes:
        lines: how many lines.
        flat: those of them whose target no document changes.
        absent: files of verdicts that are not there yet: those of other shards.
        files: how many there will be.
    """

    lines: int = 0
    flat: int = 0
    absent: int = 0
    files: int = 0


@shows_progress
def teach(
    config: TrainConfig,
    folder: Path,
    candidates: Candidates | None = None,
    *,
    shard: Shard | None = None,
    append: bool = False,
    lines_per_file: int = LINES_PER_FILE,
    console: Console | None = None,
) -> TeachResult:
    """Write the reader's verdict on every line of a config's training data.

    The verdict is what ``teaching: distilled`` computes in training, see
    :func:`~dream_training.reading.verdict.judge`, for pools made as the config says. What is
    complete in the folder is kept, and what is absent is computed: the same call resumes.

    Args:
        config: the run: reader, heads, lengths, data, pools, batches, and with
            ``candidates.retriever`` the retriever.
        folder: where to write; see :mod:`dream_training.data.taught_folder`.
        candidates: which candidates lines get beside those that they have.
        shard: which files this process writes; by default all, or with ``torchrun`` a share.
        append: add the lines of the data that the folder does not have.
        lines_per_file: lines of a file of verdicts, of which at most one is lost at a crash.
        console: where to print.

    Raises:
        FileNotFoundError: a file of the config is missing.
        ValueError: the folder was taught with other settings, by another reader, with other heads
            or lines; a line has nothing to choose from; or no document changes any target.
        OSError: the folder cannot be written.
    """
    wanted = candidates or Candidates()
    check_config(config, wanted)
    if is_stream(folder) or folder.is_file():
        raise ValueError(f"output must be a folder, got {folder}")
    if shard is not None and launched() > 1:
        raise ValueError("shard must be left out with torchrun, which gives each process a share")
    device = world.join(config.run.device, config.distribution.distributed_timeout)
    config = _with_store(config.with_changes(device=device))
    console = (console or make_console()) if world.is_main() else Console(quiet=True)
    show_on(console)
    check_models(config.reader.model, config.retriever.model if wanted.retriever else None)
    settings = settings_of(config, wanted, lines_per_file)
    preparation = _Preparation(config, folder, wanted, settings, append)
    world.on_main(preparation.prepare)
    lines = taught_lines(folder)
    reader = preparation.reader
    # Of two processes that prepared at once, the faster one has chosen the heads.
    if reader is None or reader.injection.heads != lines[0].heads:
        reader = load_reader(config.reader, config.lengths, config.run, lines[0].heads)
    own = shard or Shard(world.rank(), world.size())
    result = _teach_parts(config, reader, lines, own)
    result.absent, result.files = len(absent_parts(lines)), sum(len(own.parts) for own in lines)
    return result


def _with_store(config: TrainConfig) -> TrainConfig:
    """Keep documents that were read, unless the config says where."""
    if config.reader.document_store is None and config.reader.context == "independent":
        return config.with_changes(document_store=MEMORY)
    return config


class _Preparation:
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
        filled = make_lines(self.config, missing, self.wanted, rows) if missing else []
        heads = self._heads(lines, filled)
        self.reader = load_reader(
            self.config.reader, self.config.lengths, self.config.run, heads.by_layer()
        )
        identity = reader_identity(self.reader)
        if lines:
            _check_identity(folder, lines[0], identity, self.config.reader.model)
        if filled:
            self._write(len(lines), filled, heads, identity)

    def _heads(self, lines: Sequence[TaughtLines], filled: list[Line]) -> HeadFile:
        """The folder's heads, or those that the config names: read, or selected on the lines."""
        named = self.config.heads.file != "auto"
        if not lines:
            from datasets import Dataset

            columns = ("query", "target", "documents", "positive")
            data = Dataset.from_list([{key: line[key] for key in columns} for line in filled])
            return find_heads(self.config, data).choose(self.config.heads.top_k)
        taught = read_heads(lines[0].path / HEADS)
        if named:
            wanted = read_chosen_heads(self.config.heads.file, self.config.heads.top_k).by_layer()
            if wanted != lines[0].heads:
                raise ValueError(
                    f"heads {self.config.heads.file} are {wanted}, and {self.folder} was taught "
                    f"with {lines[0].heads}: give that head file, or another folder"
                )
        return taught

    def _write(self, number: int, filled: list[Line], heads: HeadFile, identity: str) -> None:
        """Write lines and manifest; if another process was faster, its files stay."""
        environment = describe_environment(self.config.run.device or "cpu")
        manifest = {
            "format": FORMAT,
            "lines": len(filled),
            "settings": self.settings,
            "heads": {str(layer): own for layer, own in heads.by_layer().items()},
            "reader": self.config.reader.model,
            "identity": identity,
            "digest": _digest(filled),
            "train_data": self.config.data.train_data,
            "corpus": self.wanted.corpus,
            "retriever": self.config.retriever.model if self.wanted.retriever else None,
            "environment": environment,
            "date": datetime.date.today().isoformat(),
        }
        with whole_folder(self.folder / f"lines-{number:05d}", replace=False) as new:
            write_parquet(new / CANDIDATES, filled, candidate_schema())
            write_heads(new / HEADS, heads)
            write_json(new / MANIFEST, manifest)


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


def _teach_parts(
    config: TrainConfig, reader: Reader, lines: Sequence[TaughtLines], shard: Shard
) -> TeachResult:
    """Write the files of a shard that are absent."""
    everything = [(own, part) for own in lines for part in own.parts]
    todo = [
        (own, part) for own, part in everything[shard.index :: shard.count]
        if not part.path.exists()
    ]  # fmt: skip
    total = sum(len(batch) for _, part in todo for batch in part.batches)
    result = TeachResult()
    with progress("teaching lines", total) as work:
        for own, part in todo:
            rows = _teach_part(config, reader, own, part, work)
            flat = sum(is_flat(row["logits"]) for row in rows)
            if flat == len(rows):
                raise ValueError(
                    f"no document changes the target of any of {len(rows)} lines, the first has "
                    f"the query {shortened(rows[0]['query'])}: the reader's heads "
                    f"{own.heads} do not act on them; name others, or look at the targets"
                )
            write_parquet(part.path, rows, verdict_schema(), own.stamp)
            result.lines += len(rows)
            result.flat += flat
    return result


def _teach_part(
    config: TrainConfig, reader: Reader, lines: TaughtLines, part: Part, work: Work
) -> list[dict[str, Any]]:
    """The rows of one file of verdicts."""
    rows = []
    for places, name in zip(part.batches, part.names, strict=True):
        batch = lines.candidates.take(places).to_pylist()
        rows += [{**row, "batch": name} for row in _teach_batch(config, reader, batch)]
        work.advance(len(batch))
    return rows


def _teach_batch(
    config: TrainConfig, reader: Reader, batch: Sequence[Line]
) -> list[dict[str, Any]]:
    """The verdicts on lines that are read together."""
    pools = config.pools
    queries = [line["query"] for line in batch]
    targets = [line["target"] for line in batch]
    candidates = choose_candidates(
        queries,
        [(line["documents"], line["positive"]) for line in batch],
        pools.pool,
        pools.documents_per_query,
        config.run.seed,
    )
    documents, own, positives = build_pools(candidates, pools.pool)
    if len(documents) < 2:
        raise ValueError(
            f"a batch of {len(batch)} lines has one document, so that there is nothing to choose "
            f"from; the first has the query {shortened(queries[0])}: choose another batch_size, or "
            "leave these lines out"
        )
    verdict = judge(reader, reader.read(documents, own), queries, targets)
    rows = []
    for b, (line, logits) in enumerate(zip(batch, verdict.logits.float().tolist())):
        texts = documents if own is None else [documents[i] for i in own[b]]
        place, logits = positives[b], logits[: len(texts)]
        known = dict(zip(line["documents"], line["origins"]))
        rows.append(
            {
                "query": line["query"],
                "target": line["target"],
                "documents": texts,
                "logits": logits,
                "positive": place,
                "positive_won": None if place < 0 else logits[place] == max(logits),
                "origins": [known.get(text, BATCH) for text in texts],
            }
        )
    return rows
