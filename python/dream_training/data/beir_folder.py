"""BEIR folders: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``, written and read.

The first two are also read from ``.jsonl.gz``.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from dream_kernels.files import whole_folder
from dream_kernels.parsing import parse_json, shortened, why_not_name, why_not_text
from dream_training.console import tracked
from dream_training.data.sources import BROKEN_GZIP, MAX_LINE

logger = logging.getLogger(__name__)

Corpus = dict[str, str]
Queries = dict[str, str]
Qrels = dict[str, dict[str, int]]

_CORPUS = "corpus.jsonl"
_QUERIES = "queries.jsonl"
_TRAIN = "train.jsonl"
_QRELS_HEADER = "query-id\tcorpus-id\tscore"
# A grade; the evaluation counts gains in 32 bits.
_MOST_RELEVANT = 2**20
# In every folder written here: such a folder may be replaced.
_MARKER = ".dream-beir-folder"


class Split(Protocol):
    """Queries by id and, for each, the relevance of documents by id."""

    @property
    def queries(self) -> Mapping[str, str]: ...
    @property
    def qrels(self) -> Mapping[str, Mapping[str, int]]: ...


class Example(Protocol):
    """A training example with its relevant document."""

    @property
    def query(self) -> str: ...
    @property
    def document(self) -> str: ...
    @property
    def target(self) -> str: ...


def write_beir_folder(
    path: str | os.PathLike[str],
    corpus: Mapping[str, str],
    splits: Mapping[str, Split],
    train: Iterable[Example] = (),
) -> Path:
    """Write a BEIR folder, completely or not at all.

    Args:
        path: the folder. If it exists it is replaced, provided that it is empty or was written by
            this function.
        corpus: document text by id; written with an empty title.
        splits: queries and relevance by split name, each to ``qrels/<name>.tsv``. Splits share one
            ``queries.jsonl``.
        train: if not empty, written to ``train.jsonl`` as ``query``, ``target`` and ``documents``,
            a list that holds the relevant document.

    Returns:
        The path of the folder.

    Raises:
        FileExistsError: if ``path`` is a file, or a folder with other content.
        ValueError: if an id cannot be written to a TSV file, two splits give one query id different
            texts, or a relevant document is not in the corpus.
    """
    folder = Path(path)
    queries = _merged_queries(splits)
    for split in splits.values():
        _check_qrels(split.qrels, corpus, queries)
    for key in (*corpus, *queries):
        if not key or key != key.strip() or any(mark in key for mark in "\t\r\n"):
            raise ValueError(f"id {key!r}: expected text without tabs, line breaks or outer spaces")
    _check_replaceable(folder)

    with whole_folder(folder) as content:
        (content / "qrels").mkdir()
        (content / _MARKER).touch()
        _write_jsonl(
            content / _CORPUS,
            ({"_id": key, "title": "", "text": text} for key, text in corpus.items()),
        )
        _write_jsonl(
            content / _QUERIES, ({"_id": key, "text": text} for key, text in queries.items())
        )
        for name, split in splits.items():
            _write_qrels(content / "qrels" / f"{name}.tsv", split.qrels)
        examples = [
            {"query": e.query, "target": e.target, "documents": [e.document]} for e in train
        ]
        if examples:
            _write_jsonl(content / _TRAIN, examples)
    return folder


def read_beir_folder(
    path: str | os.PathLike[str], split: str = "test"
) -> tuple[Corpus, Queries, Qrels]:
    """Read a BEIR folder, with errors that name the file and the line.

    Args:
        path: the folder.
        split: name of the file in ``qrels``, without ``.tsv``.

    Returns:
        corpus: text by document id; a title, if there is one, comes before the text and a space, as
            in ``beir``.
        queries: text by query id, in the order of the file, only those with a line in the qrels;
            the number of the others is logged.
        qrels: relevance by query id and document id; 0 means judged and not relevant.

    Raises:
        FileNotFoundError: if one of the three files is missing; the message names the splits
            that exist.
        ValueError: for a line that cannot be read, empty qrels, an id that appears twice,
            or qrels that name unknown queries or documents.
    """
    folder = Path(path)
    qrels_file = _qrels_file(folder, split)
    corpus = read_corpus(folder)
    every_query: Queries = {}
    for where, row in tracked(_read_jsonl(beir_file(folder, _QUERIES)), "reading queries"):
        _add(every_query, _id(row, where), _text(row, "text", where), where)
    qrels = _read_qrels(qrels_file)
    _check_qrels(qrels, corpus, every_query)
    queries = {key: text for key, text in every_query.items() if key in qrels}
    if dropped := len(every_query) - len(queries):
        logger.info("%s: %d queries have no line in qrels/%s.tsv", folder, dropped, split)
    return corpus, queries, qrels


def is_beir_folder(path: str | os.PathLike[str], queries: bool = False) -> bool:
    """Whether a folder has a corpus, and queries where they are asked for."""
    names = (_CORPUS, _QUERIES) if queries else (_CORPUS,)
    return all(beir_file(path, name).is_file() for name in names)


def beir_file(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of a BEIR folder, compressed where only that one exists."""
    path = Path(folder) / name
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Read the corpus of a BEIR folder alone, as :func:`read_beir_folder` does.

    Raises:
        FileNotFoundError: the folder has no ``corpus.jsonl``, compressed or not.
        ValueError: for a line that cannot be read, or an id that appears twice.
    """
    corpus: Corpus = {}
    for where, row in tracked(_read_jsonl(beir_file(path, _CORPUS)), "reading documents"):
        title = _text(row, "title", where, optional=True)
        text = _text(row, "text", where, optional=True)
        _add(corpus, _id(row, where), f"{title} {text}".strip(), where)
    return corpus


def _merged_queries(splits: Mapping[str, Split]) -> Queries:
    queries: Queries = {}
    for name, split in splits.items():
        for key, text in split.queries.items():
            if queries.setdefault(key, text) != text:
                raise ValueError(f"split {name!r}: query {key!r} has other text in another split")
    return queries


def _check_qrels(
    qrels: Mapping[str, Mapping[str, int]], corpus: Mapping[str, str], queries: Mapping[str, str]
) -> None:
    for kind, known, used in (
        ("queries", queries, qrels),
        ("documents", corpus, {key for row in qrels.values() for key in row}),
    ):
        unknown = sorted(set(used) - known.keys())
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            names = ", ".join(shortened(key)[1:-1] for key in unknown[:5])
            raise ValueError(f"qrels name unknown {kind}: {names}{more}")


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder or nothing")
    if any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise FileExistsError(f"{folder} has other content; give an empty or a new folder")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_qrels(path: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(_QRELS_HEADER + "\n")
        for query, documents in qrels.items():
            for document, score in documents.items():
                file.write(f"{query}\t{document}\t{score}\n")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line with its place, ``corpus.jsonl:17``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; a BEIR folder has one")
    packed = path.suffix == ".gz"
    with gzip.open(path) if packed else path.open("rb") as file:
        number = 0
        while True:
            number += 1
            where = f"{path}:{number}"
            try:
                content = file.readline(MAX_LINE + 1)
            except BROKEN_GZIP as error:
                raise ValueError(f"{where}: cannot be decompressed: {error}") from None
            if not content:
                return
            if len(content) > MAX_LINE:
                raise ValueError(f"{where}: a line must have at most {MAX_LINE:,} bytes")
            try:
                # The first line may begin with a byte order mark.
                yield where, content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not text in UTF-8: {error}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place; empty lines are skipped."""
    for where, text in _lines(path):
        if not text.strip():
            continue
        row = parse_json(text, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def _read_qrels(path: Path) -> Qrels:
    """Read qrels with beir's header and three columns, or TREC's four without a header."""
    qrels: Qrels = {}
    trec: bool | None = None
    for where, line in _lines(path):
        if not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t")
        if trec is None:
            trec = _is_trec(line)
            if not trec:
                if not _is_header(fields):
                    raise ValueError(
                        f"{where}: expected the header {_QRELS_HEADER!r}, or the four columns of "
                        f"TREC (query id, 0, document id, grade), got {shortened(line.rstrip())}"
                    )
                continue
        try:
            query, document, score = _trec_fields(line) if trec else fields
            relevance = int(score)
            if abs(relevance) > _MOST_RELEVANT:
                raise ValueError(score)
        except ValueError:
            columns = (
                "query id, 0, document id and a whole number of at most "
                f"{_MOST_RELEVANT}, separated by white space"
                if trec
                else "query id, document id and a whole number of at most "
                f"{_MOST_RELEVANT}, separated by tabs"
            )
            raise ValueError(
                f"{where}: expected {columns}, got {shortened(line.rstrip())}"
            ) from None
        _add(qrels.setdefault(query, {}), document, relevance, where)
    if not qrels:
        raise ValueError(f"{path}: has no line with a judgement")
    return qrels


def _is_header(fields: list[str]) -> bool:
    """Whether these are column names; a first line of data must not be taken for them."""
    named = re.search("id|query", fields[0], re.IGNORECASE)
    return len(fields) == 3 and named is not None and not _is_number(fields[2])


def _is_trec(line: str) -> bool:
    fields = line.split()
    return len(fields) == 4 and _is_number(fields[3])


def _trec_fields(line: str) -> tuple[str, str, str]:
    query, _, document, score = line.split()
    return query, document, score


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _qrels_file(folder: Path, split: str) -> Path:
    """The file of a split; if there is none, the error names the splits that exist."""
    path = folder / "qrels" / f"{split}.tsv"
    if path.is_file():
        return path
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    splits = sorted(file.stem for file in path.parent.glob("*.tsv"))
    if not splits:
        return path  # reading it says that it is missing
    raise FileNotFoundError(
        f"{path}: there is no such split, only {', '.join(splits)}: choose one with --split, or in "
        "a config with eval_split or train_split"
    )


def _id(row: Mapping[str, Any], where: str) -> str:
    value = row.get("_id")
    # Some published sets have numbers; the qrels file has their digits.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: '_id': expected text, got {shortened(value)}")
    if (reason := why_not_name(value)) is not None:
        raise ValueError(f"{where}: '_id' is no text: {reason}")
    return value


def _text(row: Mapping[str, Any], key: str, where: str, *, optional: bool = False) -> str:
    value = row.get(key)
    # Published sets have `"title": null`.
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r}: expected text, got {shortened(value)}")
    if (reason := why_not_text(value)) is not None:
        raise ValueError(f"{where}: {key!r} is no text: {reason}")
    return value


def _add(rows: dict[str, Any], key: str, value: object, where: str) -> None:
    if key in rows:
        raise ValueError(f"{where}: {shortened(key)} appears twice")
    rows[key] = value
