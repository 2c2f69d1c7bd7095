"""BEIR folders as training data: judged documents of each query."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dream_training.data.beir_folder import is_beir_folder, read_beir_folder
from dream_training.data.training_row import TrainingRow, make_row

# A BEIR folder's own file of targets, used unless another one is named.
TARGETS_FILE = "targets.jsonl"


def fits(folder: Path) -> bool:
    """Whether this is a BEIR folder."""
    return is_beir_folder(folder, queries=True)


def rows_of(folder: Path, split: str) -> Iterator[TrainingRow]:
    """Yield a row for each query with a relevant document: those, then what is judged irrelevant.

    Raises:
        FileNotFoundError: one of the three files is missing.
        ValueError: a file of the folder is not valid, or no query has a relevant document.
    """
    corpus, queries, qrels = read_beir_folder(folder, split)
    found = False
    for key, query in queries.items():
        # The highest grade first; sorting is stable, so equals keep the order of the file.
        judged = sorted(qrels[key].items(), key=lambda item: -item[1])
        relevant = sum(score > 0 for _, score in judged)
        if not relevant:
            continue
        found = True
        where = f"{folder} (query {key})"
        for document, _ in judged:
            if not corpus[document].strip():
                raise ValueError(f"{where}: its document {document!r} is blank")
        if not query.strip():
            raise ValueError(f"{where}: is blank")
        yield make_row(
            query,
            [corpus[document] for document, _ in judged],
            range(relevant),
            query_id=key,
            where=where,
        )
    if not found:
        raise ValueError(f"{folder}: no query has a relevant document in qrels/{split}.tsv")
