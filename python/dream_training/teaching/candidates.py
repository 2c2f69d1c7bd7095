"""The lines to teach, each with its candidates and where they come from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from dream_kernels.parsing import shortened
from dream_training.config import TrainConfig
from dream_training.console import progress, tracked
from dream_training.data.jsonl import column_rows, iterate_training_rows
from dream_training.data.mining import MiningOptions, Rank, mine, read_documents
from dream_training.data.neighbours import order_by_neighbours
from dream_training.data.taught_folder import BATCH, BM25, GIVEN, RETRIEVER, line_digest
from dream_training.data.training_row import TrainingRow
from dream_training.evaluation.ranking import rank_bm25, rank_by
from dream_training.models.loading import make_retriever
from dream_training.objectives.pools import build_pools, choose_candidates
from dream_training.teaching.options import Candidates

# Drawn beyond what is asked for, in place of the line's own documents.
_SPARE = 16

Line = dict[str, Any]


def given_rows(config: TrainConfig) -> list[TrainingRow]:
    """Read the lines of a config's training data."""
    data = config.data
    rows = iterate_training_rows(
        data.train_data, split=data.train_split, target_from=data.target_from
    )
    return list(tracked(rows, "reading lines"))


def missing_rows(rows: Iterable[TrainingRow], positives: str, known: set[str]) -> list[TrainingRow]:
    """The rows of which a line is not known by its digest."""
    return [
        row
        for row in rows
        if any(line_digest(line) not in known for line in column_rows(row, positives))
    ]


def make_lines(
    config: TrainConfig,
    rows: Sequence[TrainingRow],
    wanted: Candidates,
    corpus_rows: Sequence[TrainingRow],
) -> tuple[list[Line], dict[str, dict[str, int]]]:
    """Give rows their candidates.

    Args:
        config: the run.
        rows: what is to be taught.
        wanted: which candidates.
        corpus_rows: all rows of the data; their documents are searched where there is no corpus.

    Returns:
        Lines with the columns of ``candidates.parquet``; and by where candidates come from, what
        was added and left out, as :class:`~dream_training.data.mining.MiningCounts`.

    Raises:
        ValueError: all candidates of a line are the same text.
    """
    seed, positives = config.run.seed, config.data.train_positives
    full = list(rows)
    counts: dict[str, dict[str, int]] = {}
    origins: list[dict[str, str]] = [dict.fromkeys(row.documents, GIVEN) for row in full]

    def add(origin: str, rank: Rank, corpus: Any, options: MiningOptions) -> None:
        nonlocal full
        full, found = mine(full, corpus, rank, options)
        counts[origin] = asdict(found)
        for row, own in zip(full, origins, strict=True):
            for text in row.documents:
                own.setdefault(text, origin)

    ranks = replace(wanted.ranks, keep_candidates=True, seed=seed)
    if wanted.bm25 or wanted.retriever:
        corpus = read_documents(wanted.corpus, config.data.train_data, corpus_rows)
        if wanted.bm25:
            add(BM25, rank_bm25, corpus, replace(ranks, per_query=wanted.bm25))
        if wanted.retriever:
            model = make_retriever(config.retriever, config.lengths, config.run)
            add(RETRIEVER, rank_by(model), corpus, replace(ranks, per_query=wanted.retriever))
            del model
    if wanted.from_batch:
        count = wanted.from_batch
        drawn = MiningOptions(
            per_query=count, last_rank=count + _SPARE, choose="best", keep_candidates=True
        )
        texts = [text for row in corpus_rows for text in row.documents]
        add(BATCH, _rank_at_random(seed), texts, drawn)
    lines = []
    for row, mined, own in zip(rows, full, origins, strict=True):
        pairs = zip(column_rows(row, positives), column_rows(mined, positives), strict=True)
        for line, filled in pairs:
            documents = filled["documents"]
            lines.append(
                {
                    **filled,
                    "origins": [own[text] for text in documents],
                    "digest": line_digest(line),
                }
            )
    if config.pools.pool == "mined":
        _check_choice(rows, full)
    if wanted.neighbours:
        texts = [f"{line['query']}\n{line['documents'][0]}" for line in lines]
        size = config.optimisation.batch_size
        with progress("grouping neighbours"):
            order = order_by_neighbours(texts, wanted.neighbours, size, seed)
        lines = [lines[i] for i in order]
    return lines, counts


def pool_of(
    config: TrainConfig, batch: Sequence[Line]
) -> tuple[list[str], list[list[int]] | None, list[int]]:
    """The documents that the lines of a batch compete over, as training would choose them.

    Returns:
        As :func:`~dream_training.objectives.pools.build_pools`.

    Raises:
        ValueError: there is one document, and so nothing to choose from.
    """
    pools, queries = config.pools, [line["query"] for line in batch]
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
            f"{config.data.train_data}: a batch has one document, so that there is nothing to "
            f"choose from, in {len(batch)} lines such as that with the query "
            f"{shortened(queries[0])}: take another batch_size, add candidates, or leave these "
            "lines out"
        )
    return documents, own, positives


def _rank_at_random(seed: int) -> Rank:
    """Rank documents at random, the same for the same seed, query and number of documents."""

    def rank(
        queries: Mapping[str, str], corpus: Mapping[str, str], k: int
    ) -> Mapping[str, Mapping[str, float]]:
        keys = list(corpus)
        found = {}
        for key, query in queries.items():
            drawn = random.Random(f"{seed}:{query}").sample(keys, min(k, len(keys)))
            found[key] = {document: -float(place) for place, document in enumerate(drawn)}
        return found

    return rank


def _check_choice(rows: Sequence[TrainingRow], full: Sequence[TrainingRow]) -> None:
    """Raise ``ValueError`` if a line has one document alone to choose from."""
    alone = [row for row, own in zip(rows, full) if len(own.documents) < 2]
    if alone:
        first = alone[0]
        kind = "all its candidates are the same text" if first.repeated else "has one candidate"
        raise ValueError(
            f"{first.where}: {kind}, so that there is nothing to choose from, in {len(alone)} of "
            f"{len(rows)} lines: add candidates with --bm25, --retriever or --from-batch, take "
            "pool=both, or leave these lines out"
        )
