"""Rows of files and data sets, each with its place: JSON lines, JSON, CSV, Parquet, the hub."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dream_kernels.parsing import parse_json

PlacedRow = tuple[str, dict[str, Any]]

_LINES = (".jsonl", ".ndjson", ".json")
# A compressed line of zeros expands to a thousand times its size; no document is near this.
MAX_LINE = 64 << 20
# Characters searched for the first that is not white space: it tells a list from lines.
_BEGINNING = 1 << 16
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_UNREADABLE = (UnicodeDecodeError, *BROKEN_GZIP)
_TABLES = {".csv": ",", ".tsv": "\t"}
_FILE_SUFFIXES = (*_LINES, *_TABLES, ".gz", ".parquet", ".txt", ".md")


def read_rows(
    source: str | os.PathLike[str], split: str = "train", *, streaming: bool = False
) -> Iterator[PlacedRow]:
    """Yield the rows of a file or a data set, each with its place for messages.

    Args:
        source: a ``.jsonl``, ``.json`` (lines, or one list of objects), ``.csv``, ``.tsv`` (the
            first line names the columns) or ``.parquet`` file, all but the last also with ``.gz``;
            a folder that ``datasets`` can load or has saved; or the name of a data set on the hub,
            followed by ``:subset`` if it has subsets.
        split: of a folder or a data set.
        streaming: do not download a data set before reading it.

    Raises:
        FileNotFoundError: there is no such file or data set, or it cannot be reached.
        ValueError: a line is not valid; the message names file and line.
    """
    path = Path(source)
    if path.is_file():
        name = path.name.removesuffix(".gz")
        if name.endswith(_LINES):
            return _read_json(path)
        if Path(name).suffix in _TABLES:
            return _read_table(path, _TABLES[Path(name).suffix])
        if path.suffix == ".parquet":
            return _load("parquet", "train", str(path), data_files=str(path), streaming=streaming)
        raise ValueError(
            f"{path}: expected a file that ends in .jsonl, .json, .csv, .tsv (also with .gz), "
            ".parquet, .txt or .md"
        )
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _load_saved(path, split)
        return _load(str(path), split, str(path), streaming=streaming)
    name = str(source)
    if name.startswith((".", "/", "~")) or name.endswith(_FILE_SUFFIXES) or name.count("/") > 1:
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    name, _, subset = name.partition(":")
    return _load(name, split, str(source), name=subset or None, streaming=streaming)


def open_text(path: str | os.PathLike[str], newline: str | None = None) -> Any:
    """Open a text file for reading, decompressed if its name ends in ``.gz``.

    In UTF-8, with or without a byte order mark.
    """
    # newline="": lines end where the format says, within a quoted cell they do not.
    if str(path).endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return open(path, encoding="utf-8-sig", newline=newline)


def _read_json(path: Path) -> Iterator[PlacedRow]:
    with open_text(path) as file:
        try:
            first = file.read(_BEGINNING).lstrip()[:1]
        except _UNREADABLE as error:
            raise ValueError(f"{path}: cannot be read as text: {error}") from error
    if first == "[" and ".jsonl" not in path.name:
        yield from _read_list(path)
        return
    with open_text(path) as lines:
        number = 0
        while True:
            number += 1
            where = f"{path}:{number}"
            try:
                line = lines.readline(MAX_LINE + 1)
            except _UNREADABLE as error:
                raise ValueError(f"{where}: cannot be read as text: {error}") from error
            if not line:
                return
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: a line must have at most {MAX_LINE:,} characters")
            if line.strip():
                yield where, _object(_parse_line(line, where), where)


def _parse_line(line: str, where: str) -> Any:
    try:
        return parse_json(line, where)
    except ValueError as error:
        if line.endswith("\n"):
            raise
        # The writer was interrupted, or is still writing.
        raise ValueError(f"{where}: the file ends in the middle of the line ({error})") from error


def _read_list(path: Path) -> Iterator[PlacedRow]:
    with open_text(path) as file:
        try:
            text = file.read()
        except _UNREADABLE as error:
            raise ValueError(f"{path}: cannot be read as text: {error}") from error
    rows = parse_json(text, str(path))
    for index, row in enumerate(rows):
        where = f"{path}[{index}]"
        yield where, _object(row, where)


def _read_table(path: Path, delimiter: str) -> Iterator[PlacedRow]:
    """Rows of text; an empty cell is a missing value. The place is that of a row's last line."""
    # csv's own limit is 128 KiB a cell, for the whole process.
    limit = csv.field_size_limit(MAX_LINE)
    try:
        with open_text(path, newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            while True:
                try:
                    row = next(rows, None)
                except (csv.Error, *_UNREADABLE) as error:
                    where = f"{path}:{rows.line_num + 1}"
                    raise ValueError(f"{where}: cannot be read as a table: {error}") from error
                if row is None:
                    return
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    named = len(rows.fieldnames or ())
                    raise ValueError(f"{where}: expected {named} cells, as the first line has")
                yield where, {name: cell or None for name, cell in row.items()}
    finally:
        csv.field_size_limit(limit)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a line must be an object, got {type(row).__name__}")
    return row


def _load(builder: str, split: str, label: str, **options: Any) -> Iterator[PlacedRow]:
    from datasets import load_dataset

    try:
        data = load_dataset(builder, split=split, **options)
        for index, row in enumerate(data):
            yield f"{label}[{index}]", dict(row)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{label}: no such data set: {error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"{label}: the data set cannot be reached: {error}") from error
    except Exception as error:
        # From datasets, which refuses code of a data set, from Arrow, or from decompression.
        raise ValueError(f"{label}: cannot be loaded: {type(error).__name__}: {error}") from error


def _load_saved(path: Path, split: str) -> Iterator[PlacedRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        data: Any = load_from_disk(str(path))
    except Exception as error:  # datasets, json and Arrow each raise their own
        raise ValueError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"{path}: has no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    rows = iter(data)
    for index in range(len(data)):
        try:
            row = dict(next(rows))
        except Exception as error:  # the rows are in files that may be corrupt
            raise ValueError(
                f"{path}[{index}]: cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        yield f"{path}[{index}]", row
