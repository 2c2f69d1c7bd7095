"""Results as JSON lines: their schema, and writing, reading and checking them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dream_kernels.files import write_text

from .environment import device_slug

SCHEMA = 1
NUMBER = (int, float)
STATUSES = ("ok", "refused", "wrong", "failed")


class Maybe:
    """A field that may be null."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Rare:
    """A field that may be missing."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Table:
    """A field that maps names to values of one kind."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Rows:
    """A field that is a list of values of one kind."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


QUANTILES = {"median": NUMBER, "lower": NUMBER, "upper": NUMBER, "least": NUMBER, "runs": int}
_ENVIRONMENT = {
    "device": str,
    "device_type": str,
    "driver": Maybe(str),
    "threads": int,
    "python": str,
    "system": str,
    "versions": Table(str),
    "commit": Maybe(str),
    "date": str,
}
_COMMON = {
    "schema": int,
    "suite": str,
    "quick": bool,
    "environment": _ENVIRONMENT,
    "peer": str,
    "status": str,
    "reason": Maybe(str),
}
_CASE = {
    "name": str,
    "batch": int,
    "query_heads": int,
    "key_heads": int,
    "head_dim": int,
    "rows": int,
    "prefix": int,
    "shared": bool,
    "local": int,
    "documents": int,
    "covered": int,
    "dtype": str,
    "mode": str,
    "gradients": Rows(str),
    "scored": NUMBER,
    "padding": Rare(int),
}
_KERNEL = {
    **_COMMON,
    "case": _CASE,
    "checked_batch": int,
    "computes": str,
    "note": str,
    "ceilings": Maybe({"gemm": Table(NUMBER), "copy": NUMBER}),
    "forward": Maybe(QUANTILES),
    "backward": Maybe(QUANTILES),
    "total": Maybe(QUANTILES),
    "ratio": Maybe(NUMBER),
    "operations_per_second": Maybe(NUMBER),
    "bytes_per_second": Maybe(NUMBER),
    "share_of_ceiling": Maybe(NUMBER),
    "forward_share_of_gemm": Maybe(NUMBER),
    "peak_bytes": Maybe(int),
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "kernel": _KERNEL,
    "overhead": _KERNEL,
    "scaling": {**_KERNEL, "axis": str, "value": NUMBER},
    "acceptance": _KERNEL,
    "compare": {**_KERNEL, "revision": str},
    "gpu tests": {**_COMMON, "command": Rows(str), "seconds": NUMBER, "said": str},
    "teaching": {
        **_COMMON,
        "model": str,
        "dtype": str,
        "batch": int,
        "documents": int,
        "document_tokens": int,
        "query_tokens": int,
        "target_tokens": int,
        "note": str,
        "total": Maybe(QUANTILES),
        "seconds_per_pair": Maybe(NUMBER),
        "ratio": Maybe(NUMBER),
    },
    "step": {
        **_COMMON,
        "model": str,
        "dtype": str,
        "batch": int,
        "documents": int,
        "document_tokens": int,
        "note": str,
        "tokens": int,
        "total": Maybe(QUANTILES),
        "phases": Table(QUANTILES),
        "tokens_per_second": Maybe(NUMBER),
        "ratio": Maybe(NUMBER),
        "loss": Maybe(NUMBER),
        "loss_difference": Maybe(NUMBER),
        "gradient_cosine": Maybe(NUMBER),
        "gradient_size": Maybe(NUMBER),
        "models_bytes": Maybe(int),
        "peak_bytes": Maybe(int),
    },
}


def validate(record: Any) -> None:
    """Check one record against its suite's schema.

    Raises:
        ValueError: a field is missing, unknown, or of the wrong kind; the message names it.
    """
    if not isinstance(record, Mapping) or record.get("suite") not in SCHEMAS:
        raise ValueError(f"a record's suite must be one of {', '.join(SCHEMAS)}")
    _check(record, SCHEMAS[record["suite"]], record["suite"])
    if record["schema"] != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {record['schema']}")
    if record["status"] not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {record['status']!r}")
    if (record["reason"] is None) != (record["status"] == "ok"):
        raise ValueError(
            f"status {record['status']!r} does not go with reason {record['reason']!r}"
        )


def _check(value: Any, kind: Any, path: str) -> None:
    if isinstance(kind, Maybe):
        if value is not None:
            _check(value, kind.kind, path)
    elif isinstance(kind, Rows):
        _require(isinstance(value, list), path, "a list", value)
        for i, item in enumerate(value):
            _check(item, kind.kind, f"{path}[{i}]")
    elif isinstance(kind, Table):
        _require(isinstance(value, Mapping), path, "a table", value)
        for key, item in value.items():
            _check(item, kind.kind, f"{path}.{key}")
    elif isinstance(kind, dict):
        _require(isinstance(value, Mapping), path, "a table", value)
        rare = {k for k, v in kind.items() if isinstance(v, Rare) and k not in value}
        difference = sorted((kind.keys() - rare) ^ value.keys())
        _require(not difference, path, "exactly its fields", difference)
        for key, item in value.items():
            own = kind[key]
            _check(item, own.kind if isinstance(own, Rare) else own, f"{path}.{key}")
    else:
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        _require(right, path, str(kind), value)


def _require(condition: bool, path: str, expected: str, actual: Any) -> None:
    if not condition:
        raise ValueError(f"{path} must be {expected}, got {actual!r}")


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write checked records to a file, which is replaced as a whole."""
    lines = []
    for record in records:
        validate(record)
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    write_text(path, "".join(lines))
    return path


class Keeper:
    """Writes the records of a suite as they arrive, so that an interrupted suite keeps its results.

    Args:
        folder: of the files.
        suite: in the file's name.
        part: whether only a part of the suite runs; other records in the file then stay, and those
            of the same case and peer are replaced.
    """

    def __init__(self, folder: Path, suite: str, part: bool = False) -> None:
        self.folder, self.suite, self.part = folder, suite, part
        self.path: Path | None = None
        self._before: list[Mapping[str, Any]] | None = None
        self._done: list[Mapping[str, Any]] = []
        self._last: list[Mapping[str, Any]] = []

    def add(self, records: list[dict[str, Any]]) -> Path | None:
        """Add records to the file and return its path; what was added before stays."""
        self._done += self._last
        self._last = []
        return self.replace_last(records)

    def replace_last(self, records: list[dict[str, Any]]) -> Path | None:
        """Replace the records that were added last."""
        self._last = list(records)
        everything = [*self._done, *self._last]
        if everything:
            path = self.folder / file_name(self.suite, everything[0]["environment"])
            if self._before is None:
                self._before = [*read_file(path)] if self.part and path.is_file() else []
            new = {_key(record) for record in everything}
            kept = [record for record in self._before if _key(record) not in new]
            self.path = write(path, [*kept, *everything])
        return self.path


def read(folder: Path) -> list[dict[str, Any]]:
    """Read and check all records of a folder, file by file in alphabetical order.

    Raises:
        ValueError: a line is not a record; the message names file and line.
    """
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_file(path)]


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read and check the records of one file.

    Raises:
        ValueError: as :func:`read`.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            validate(record)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        records.append(record)
    return records


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Identity of a record: another one with the same key is a newer figure of the same thing."""
    case = record.get("case")
    if case is None:
        return record["suite"], record["peer"], record.get("model")
    # The cases along one axis share their name.
    own = (record["axis"], record["value"]) if "axis" in record else case["name"]
    asked = (case["dtype"], case["mode"], *case["gradients"])
    return record["suite"], record["peer"], own, asked


def file_name(suite: str, environment: Mapping[str, Any]) -> str:
    """Suite and device, as the name of a file."""
    return f"{suite.replace(' ', '-')}-{device_slug(environment['device'])}.jsonl"
