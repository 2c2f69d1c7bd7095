"""Training data as JSON lines: a query, a target, candidate documents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def read_training_data(path: str | os.PathLike[str]) -> Dataset:
    """Read a JSONL file into a data set with the columns of ``DreamCollator``.

    A line is an object with

    - ``query``: text;
    - ``target``: the text that the reader shall predict, or ``answers``: a list whose first text
      is the target;
    - ``documents``: a list of candidates, each a text or ``{"title": ..., "text": ...}``. Every
      candidate joins the batch's pool;
    - ``positive`` (optional): ``true`` when the first document is known to be relevant, or the
      index of the relevant one. It is only watched, never trained on by DREAM.

    Args:
        path: the file, or a folder that holds ``train.jsonl``.

    Returns:
        A ``datasets.Dataset`` with ``query``, ``target``, ``documents`` and ``positive`` (-1 where
        it is not known).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not valid; the message names file and line.
    """
    from datasets import Dataset

    path = Path(path)
    if path.is_dir():
        path = path / "train.jsonl"
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_parse(line, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path}: holds no line")
    return Dataset.from_list(rows)


def to_training_data(rows: Iterable[tuple[str, str, str]]) -> Dataset:
    """Make a data set from (query, target, relevant document) triples."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"query": query, "target": target, "documents": [document], "positive": 0}
            for query, target, document in rows
        ]
    )


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a line must be an object, got {type(row).__name__}")
    documents = row.get("documents")
    if not isinstance(documents, list) or not documents:
        raise ValueError(f"{where}: documents must be a list of at least one candidate")
    return {
        "query": _text(row, "query", where),
        "target": _target(row, where),
        "documents": [_document(d, i, where) for i, d in enumerate(documents)],
        "positive": _positive(row.get("positive"), len(documents), where),
    }


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise ValueError(f"{where}: has no {key}; its keys are {', '.join(row) or 'none'}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} must be a text that is not empty, got {value!r}")
    return value


def _target(row: dict[str, Any], where: str) -> str:
    if "target" in row or "answers" not in row:
        return _text(row, "target", where)
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: answers must be a list of at least one text, got {answers!r}")
    return _text({"answers[0]": answers[0]}, "answers[0]", where)


def _document(value: Any, index: int, where: str) -> str:
    name = f"documents[{index}]"
    if isinstance(value, dict):
        title, text = value.get("title") or "", value.get("text") or ""
        value = f"{title}\n{text}" if title and text else title or text
    return _text({name: value}, name, where)


def _positive(value: Any, documents: int, where: str) -> int:
    if value is None or value is False:
        return -1
    if value is True:
        return 0
    if not isinstance(value, int) or not -1 <= value < documents:
        raise ValueError(
            f"{where}: positive must be true, false or an index in 0 .. {documents - 1}, "
            f"got {value!r}"
        )
    return value
