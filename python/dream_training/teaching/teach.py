"""``dream teach``: the reader's verdict on every line, computed once and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_kernels.files import is_stream
from dream_kernels.parsing import shortened
from dream_training.choices import LINES_PER_FILE, MEMORY
from dream_training.config import TrainConfig
from dream_training.console import Work, make_console, progress, show_on, shows_progress
from dream_training.data.taught_folder import (
    BATCH,
    Part,
    TaughtLines,
    absent_parts,
    taught_lines,
    verdict_schema,
    write_parquet,
)
from dream_training.data.taught_statistics import is_flat
from dream_training.distributed import world
from dream_training.distributed.launched import launched
from dream_training.models.loading import check_models
from dream_training.reading.loading import load_reader
from dream_training.reading.verdict import judge
from dream_training.teaching.candidates import Line, pool_of
from dream_training.teaching.options import Candidates, Shard, check_config, settings_of
from dream_training.teaching.preparation import Preparation

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader


# So many lines whose target no document changes, and no other, show that the heads do nothing.
_ENOUGH_LINES = 8


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
        FloatingPointError: a verdict is not finite.
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
    preparation = Preparation(config, folder, wanted, settings, append)
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
            result.lines += len(rows)
            result.flat += sum(is_flat(row["logits"]) for row in rows)
            if result.flat == result.lines >= _ENOUGH_LINES:
                raise ValueError(
                    f"no document changes the target of any of {result.lines} lines, the last has "
                    f"the query {shortened(rows[-1]['query'])}: the reader's heads {own.heads} do "
                    "not act on them; name others, or look at the targets"
                )
            write_parquet(part.path, rows, verdict_schema(), own.stamp)
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
    queries = [line["query"] for line in batch]
    targets = [line["target"] for line in batch]
    documents, own, positives = pool_of(config, batch)
    verdict = judge(reader, reader.read(documents, own), queries, targets)
    finite = verdict.logits.isfinite().all(-1).tolist()
    if not all(finite):
        raise FloatingPointError(
            "the reader's verdict is not finite on the query "
            f"{shortened(queries[finite.index(False)])}: dtype=float32 may help"
        )
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
