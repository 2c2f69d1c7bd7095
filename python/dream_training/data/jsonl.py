"""Training data: any form read into columns, and written as the project's own JSON lines."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels.files import open_whole
from dream_training.choices import POSITIVES, check_choice
from dream_training.console import tracked
from dream_training.data import raw_text
from dream_training.data.forms import Parse, beir, find_form
from dream_training.data.raw_text import TextLengths
from dream_training.data.sources import read_rows
from dream_training.data.targets import choose_targets
from dream_training.data.training_row import TrainingRow, text_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Rows per Arrow table: until then they are Python objects, which take more memory than text.
_CHUNK = 10_000
# Rows of a stream that are shuffled together.
STREAM_BUFFER = 1000


def read_training_data(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    target_from: str | None = None,
    positives: str = "first",
) -> Dataset:
    """Read training data of any form into a data set with the columns of ``DreamCollator``.

    Args:
        source: a file, a folder, or the name of a data set on the hub, as
            :func:`iterate_training_rows` takes them.
        split: of a BEIR folder's qrels, or of a data set.
        target_from: where the target comes from; by default the row's own ``target``, or its
            first answer. See :func:`~dream_training.data.targets.choose_targets`.
        positives: of several relevant documents keep the ``first``, or make one row for ``each``.
            The others are dropped from the row, where they would count as irrelevant.

    Returns:
        A ``datasets.Dataset`` with ``query``, ``target``, ``documents`` and ``positive`` (-1 if
        it is not known).

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: a line is not valid; the message names file and line.
    """
    from datasets import Dataset, concatenate_datasets

    tables: list[Dataset] = []
    chunk: list[dict[str, Any]] = []
    rows = _columns(source, split, target_from, positives)
    for row in tracked(rows, f"reading {Path(source).name}"):
        chunk.append(row)
        if len(chunk) == _CHUNK:
            tables.append(Dataset.from_list(chunk))
            chunk = []
    if chunk:
        tables.append(Dataset.from_list(chunk))
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def stream_training_data(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    target_from: str | None = None,
    positives: str = "first",
    endless_seed: int | None = None,
) -> IterableDataset:
    """Read training data row by row during training; arguments and errors as above.

    An error in a line is raised when the line is reached. A trainer's arguments need
    ``accelerator_config={"dispatch_batches": False}``: dispatched batches lose the documents beyond
    the number of queries.

    Args:
        source: as in :func:`read_training_data`.
        split: as there.
        target_from: as there.
        positives: as there.
        endless_seed: repeat the data endlessly, shuffled differently in each round within a buffer
            of 1,000 rows, so that a row count alone gives a run's position.

    Returns:
        A ``datasets.IterableDataset`` with the columns of :func:`read_training_data`.
    """
    from datasets import Features, IterableDataset, Value

    features = Features(
        {
            "query": Value("string"),
            "target": Value("string"),
            "documents": [Value("string")],
            "positive": Value("int64"),
        }
    )
    options: dict[str, Any] = {
        "source": str(source),
        "split": split,
        "target_from": target_from,
        "positives": positives,
    }
    if endless_seed is None:
        return IterableDataset.from_generator(
            _columns, features=features, gen_kwargs={**options, "streaming": True}
        )
    return IterableDataset.from_generator(
        _again_and_again, features=features, gen_kwargs={**options, "seed": endless_seed}
    )


def iterate_training_rows(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    target_from: str | os.PathLike[str] | None = None,
    need_target: bool = True,
    streaming: bool = False,
    text_lengths: TextLengths | None = None,
    on_bad_line: Callable[[str], None] | None = None,
) -> Iterator[TrainingRow]:
    """Yield the rows of training data of any form.

    The form of a file's lines follows from the keys of the first:

    - the project's own: ``query``; ``target``, or ``answers`` (a list of which the first is the
      target); ``documents``, a list of candidates, each a text or ``{"title": ..., "text": ...}``;
      and, if known, ``positive``: ``true`` (the first is relevant), an index or a list of indices;
    - Tevatron: ``query``, ``positive_passages``, ``negative_passages``, perhaps ``answers``;
    - FlagEmbedding: ``query``, ``pos``, ``neg``;
    - sentence-transformers: ``query`` or ``anchor``, ``positive``, ``negative``, ``negative_2``;
    - ``text`` alone: see :func:`~dream_training.data.raw_text.rows_of_text`.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file (the first two also ``.gz``), or one of
            text, ``.txt`` or ``.md``; a folder with ``train.jsonl``, a BEIR folder, a folder of
            texts, or one that ``datasets`` loads; or the name of a data set on the hub,
            ``name:subset`` if it has subsets.
        split: of a BEIR folder's qrels, or of a data set.
        target_from: as in :func:`~dream_training.data.targets.choose_targets`. A BEIR folder with
            ``targets.jsonl`` uses it by default.
        need_target: rows without a target are an error.
        streaming: do not download a data set before reading it.
        text_lengths: how plain ``text`` is cut.
        on_bad_line: called with the error of a line, which is then skipped; by default it is
            raised. Lines that are not JSON always raise.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: a line is not valid, or there is none.
    """
    path = Path(source)
    if path.is_dir() and not (path / "train.jsonl").is_file() and beir.fits(path):
        rows = beir.rows_of(path, split)
        if target_from is None and (path / beir.TARGETS_FILE).is_file():
            target_from = path / beir.TARGETS_FILE
    else:
        rows = _rows_of_lines(source, split, streaming, text_lengths, on_bad_line)
    return choose_targets(rows, target_from) if need_target or target_from is not None else rows


def to_training_data(rows: Iterable[tuple[str, str, str]]) -> Dataset:
    """Make a data set from (query, target, relevant document) triples."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"query": query, "target": target, "documents": [document], "positive": 0}
            for query, target, document in rows
        ]
    )


def write_training_rows(path: str | os.PathLike[str], rows: Iterable[TrainingRow]) -> int:
    """Write rows in the project's own form, whole or not at all, and return their number.

    The file is renamed into place when complete; on an error there is none, or the old one stays.
    """
    return write_json_lines(path, (row.as_json() for row in rows))


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write objects as lines of JSON, whole or not at all, and return their number."""
    count = 0
    with open_whole(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _rows_of_lines(
    source: str | os.PathLike[str],
    split: str,
    streaming: bool,
    text_lengths: TextLengths | None,
    on_bad_line: Callable[[str], None] | None,
) -> Iterator[TrainingRow]:
    path = Path(source)
    if path.is_dir():
        if (path / "train.jsonl").is_file():
            path = path / "train.jsonl"
            source = path
        elif files := raw_text.text_files(path):
            yield from raw_text.rows_of_text(raw_text.read_files(files), text_lengths)
            return
    elif path.suffix in raw_text.SUFFIXES and path.is_file():
        yield from raw_text.rows_of_text(raw_text.read_files([path]), text_lengths)
        return
    placed = read_rows(source, split, streaming=streaming)
    first = next(placed, None)
    if first is None:
        raise ValueError(f"{source}: holds no line")
    lines = _with_first(first, placed)
    where, row = first
    if raw_text.fits(row):
        texts = ((where, text_of(row, "text", where)) for where, row in lines)
        yield from raw_text.rows_of_text(texts, text_lengths)
        return
    parse = find_form(row, where)
    for where, row in lines:
        parsed = _parsed(parse, row, where, on_bad_line)
        if parsed is not None:
            yield parsed


def _parsed(
    parse: Parse, row: dict[str, Any], where: str, on_bad_line: Callable[[str], None] | None
) -> TrainingRow | None:
    try:
        return parse(row, where)
    except ValueError as error:
        if on_bad_line is None:
            raise
        on_bad_line(str(error))
        return None


def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _columns(
    source: str | os.PathLike[str],
    split: str,
    target_from: str | None,
    positives: str,
    streaming: bool = False,
) -> Iterator[dict[str, Any]]:
    check_choice("positives", positives, POSITIVES)
    rows = iterate_training_rows(source, split=split, target_from=target_from, streaming=streaming)
    for row in rows:
        yield from column_rows(row, positives)


def column_rows(row: TrainingRow, positives: str) -> Iterator[dict[str, Any]]:
    """Yield a row in the columns of :func:`read_training_data`: once, or for each positive."""
    irrelevant = [d for i, d in enumerate(row.documents) if i not in row.positives]
    known = [row.documents[i] for i in row.positives]
    if len(known) <= 1:
        # In the order of the file, so that the data is recognised in it.
        yield _column_row(row, list(row.documents), row.positives[0] if known else -1)
        return
    for document in known if positives == "each" else known[:1]:
        yield _column_row(row, [document, *irrelevant], 0)


def _again_and_again(source: str, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a stream endlessly, in an order that depends on seed and round."""
    stream = stream_training_data(source, **options).shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    first = _version_of(source)
    for round_number in itertools.count():
        stream.set_epoch(round_number)
        yield from stream
        if _version_of(source) != first:
            raise ValueError(f"{source}: the file changed while it was read")


def _version_of(source: str) -> tuple[int, int] | None:
    """Size and modification time of a file; None if it is not a file."""
    path = Path(source)
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _column_row(row: TrainingRow, documents: list[str], positive: int) -> dict[str, Any]:
    return {
        "query": row.query,
        "target": row.target,
        "documents": documents,
        "positive": positive,
    }
