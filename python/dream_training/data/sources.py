"""Rows of files and data sets, each with its place: JSON lines, JSON, Parquet, names of the hub."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PlacedRow = tuple[str, dict[str, Any]]

_LINES = (".jsonl", ".ndjson", ".json")
_FILE_SUFFIXES = (*_LINES, ".gz", ".parquet", ".txt", ".md")


def read_rows(
    source: str | os.PathLike[str], split: str = "train", *, streaming: bool = False
) -> Iterator[PlacedRow]:
    """Yield the rows of a file or a data set, each with its place for messages.

    Args:
        source: a ``.jsonl``, ``.json`` (lines, or one list of objects) or ``.parquet`` file, the
            first two also with ``.gz`` behind; a folder that ``datasets`` can load or has saved;
            or the name of a data set on the hub, with ``:subset`` behind if it has subsets.
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
        if path.suffix == ".parquet":
            return _load("parquet", "train", str(path), data_files=str(path), streaming=streaming)
        raise ValueError(
            f"{path}: expected a file that ends in .jsonl, .json (also with .gz) or .parquet"
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


def open_text(path: str | os.PathLike[str]) -> Any:
    """Open a text file for reading, unpacked if its name ends in ``.gz``."""
    if str(path).endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _read_json(path: Path) -> Iterator[PlacedRow]:
    with open_text(path) as file:
        try:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
        except (UnicodeDecodeError, gzip.BadGzipFile) as error:
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
                line = next(lines, None)
                if line is None:
                    return
                row = json.loads(line) if line.strip() else None
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from error
            if line.strip():
                yield where, _object(row, where)


def _read_list(path: Path) -> Iterator[PlacedRow]:
    with open_text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
    for index, row in enumerate(rows):
        where = f"{path}[{index}]"
        yield where, _object(row, where)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a line must be an object, got {type(row).__name__}")
    return row


def _load(builder: str, split: str, label: str, **options: Any) -> Iterator[PlacedRow]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(builder, split=split, **options)
        for index, row in enumerate(data):
            yield f"{label}[{index}]", dict(row)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{label}: no such data set: {error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"{label}: the data set cannot be reached: {error}") from error
    except (DatasetsError, RuntimeError) as error:
        # RuntimeError: the data set would run code of its own.
        raise ValueError(f"{label}: cannot be loaded: {error}") from error


def _load_saved(path: Path, split: str) -> Iterator[PlacedRow]:
    from datasets import DatasetDict, load_from_disk

    data: Any = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"{path}: has no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    for index, row in enumerate(data):
        yield f"{path}[{index}]", dict(row)
