"""What ``dream teach`` is asked for, beside the config of a training."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from dream_kernels.parsing import shortened
from dream_training.choices import check_at_least
from dream_training.config import TrainConfig
from dream_training.data.mining import MiningOptions


@dataclass(frozen=True)
class Shard:
    """Which files of verdicts a process writes: every ``count``-th, from ``index`` on.

    Raises:
        ValueError: there is no such shard.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard must be INDEX/COUNT with an index from 0 on below the count, got {self}"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``0/4``.

        Raises:
            ValueError: it is not written so, or there is no such shard.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise ValueError(
                f"shard must be written INDEX/COUNT, such as 0/4, got {shortened(text)}"
            )
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Candidates:
    """Which candidates lines get beside those that they have.

    Attributes:
        bm25: how many that BM25 ranks high.
        retriever: how many that the config's retriever ranks high.
        from_batch: how many documents of other lines, drawn at random; with ``pool: mined``.
        neighbours: the lines of a batch come in groups of this many that are alike, see
            :func:`~dream_training.data.neighbours.group_rows`; 0 for batches at random. With
            another pool than ``mined``.
        corpus: what BM25 and the retriever search, as ``dream mine`` takes it.
        ranks: first and last rank to take from, how to choose, and what to leave out.

    Raises:
        ValueError: a number is negative.
    """

    bm25: int = 0
    retriever: int = 0
    from_batch: int = 0
    neighbours: int = 0
    corpus: str | None = None
    ranks: MiningOptions = field(default_factory=MiningOptions)

    def __post_init__(self) -> None:
        for name in ("bm25", "retriever", "from_batch", "neighbours"):
            check_at_least(name, getattr(self, name), 0)

    def settings(self) -> dict[str, Any]:
        """What decides which candidates there are."""
        names = ("bm25", "retriever", "from_batch", "neighbours")
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        if not self.bm25 and not self.retriever:
            return counts
        of_ranks = ("first_rank", "last_rank", "choose", "exclude_answers")
        return {**counts, **{name: getattr(self.ranks, name) for name in of_ranks}}


def check_config(config: TrainConfig, candidates: Candidates) -> None:
    """Raise ``ValueError`` if a config cannot be taught."""
    wanted = config.objective
    if wanted.name != "dream" or wanted.teaching != "distilled":
        got = wanted.name if wanted.name != "dream" else f"teaching {wanted.teaching!r}"
        raise ValueError(
            "dream teach needs objective 'dream' with teaching 'distilled': other verdicts depend "
            f"on the retriever; got {got}"
        )
    if config.data.taught is not None:
        raise ValueError("taught must be null for dream teach, which writes such a folder")
    if config.data.streaming:
        raise ValueError("streaming must be false for dream teach: it reads all lines first")
    if config.reader.reader_sharding != "replicated":
        raise ValueError(
            "reader_sharding must be 'replicated' for dream teach, whose processes read apart, "
            f"got {config.reader.reader_sharding!r}"
        )
    if candidates.from_batch and config.pools.pool != "mined":
        raise ValueError(
            "--from-batch is for pool 'mined': with pool "
            f"{config.pools.pool!r} a line has the documents of its batch"
        )
    size = config.optimisation.batch_size
    if candidates.neighbours and config.pools.pool == "mined":
        raise ValueError(
            "--neighbours is for pools of a batch: with pool 'mined' a line has its own"
        )
    if candidates.neighbours and size % candidates.neighbours:
        raise ValueError(
            f"batch_size must be a multiple of --neighbours {candidates.neighbours}, got {size}"
        )


def settings_of(config: TrainConfig, candidates: Candidates, lines_per_file: int) -> dict[str, Any]:
    """What decides candidates and verdicts, beside reader, heads and texts; as JSON values."""
    lengths = config.lengths
    return {
        "context": config.reader.context,
        "mode": config.reader.mode,
        "document_mass": config.reader.document_mass,
        "injected_rows": config.reader.injected_rows,
        "reader_prompt": config.reader.reader_prompt,
        "query_max_len": lengths.query_max_len,
        "reader_passage_max_len": lengths.reader_passage_max_len or lengths.passage_max_len,
        "target_max_len": lengths.target_max_len,
        "train_positives": config.data.train_positives,
        "pool": config.pools.pool,
        "documents_per_query": config.pools.documents_per_query,
        "batch_size": config.optimisation.batch_size,
        "lines_per_file": lines_per_file,
        "seed": config.run.seed,
        **candidates.settings(),
    }
