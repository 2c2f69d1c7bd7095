"""The folder of ``dream teach``: lines, their candidates, and the reader's verdicts in Parquet.

::

    lines-00000/manifest.json       settings, reader, digests: what decides the verdicts
    lines-00000/heads.yaml          the heads that received the weights
    lines-00000/candidates.parquet  the lines with their candidates
    train-00000-00003.parquet       verdicts of some of these lines; the file is whole or absent

Lines that are added later have a folder of their own, ``lines-00001``. Which lines a Parquet file
holds depends on the manifest alone: several processes may write to one folder, and what was
interrupted is written again under the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels.files import open_whole
from dream_kernels.parsing import shortened
from dream_training.json_file import read_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

FORMAT = "dream-kernels taught 1"
MANIFEST, HEADS, CANDIDATES = "manifest.json", "heads.yaml", "candidates.parquet"
# Where a candidate of a line comes from.
GIVEN, BM25, RETRIEVER, BATCH = ORIGINS = ("given", "bm25", "retriever", "batch")
# Verdicts whose logits differ by less, in nats, tell the documents apart by rounding alone.
FLAT = 1e-3
_METADATA = b"dream_taught"
_MANIFEST_KEYS = {
    "lines": int, "settings": dict, "heads": dict, "reader": str, "identity": str, "digest": str,
}  # fmt: skip
_COUNTS = ("batch_size", "lines_per_file")


@dataclass(frozen=True)
class Part:
    """A file of verdicts.

    Attributes:
        path: of the file, which may be absent.
        batches: the lines that are read together, as places in the candidates.
        names: of the batches, where the lines of one share a pool; None elsewhere.
    """

    path: Path
    batches: list[list[int]]
    names: list[str | None]


@dataclass(frozen=True)
class TaughtLines:
    """Lines that were prepared together.

    Attributes:
        path: their folder.
        number: of the folder.
        manifest: what ``manifest.json`` holds.
    """

    path: Path
    number: int
    manifest: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides candidates and verdicts, beside reader, heads and texts."""
        return dict(self.manifest["settings"])

    @property
    def heads(self) -> dict[int, list[int]]:
        """The heads that received the weights."""
        return {int(layer): list(own) for layer, own in self.manifest["heads"].items()}

    @property
    def shared(self) -> bool:
        """Whether the lines of a batch share one pool."""
        return shares_pools(self.settings)

    @cached_property
    def candidates(self) -> pyarrow.Table:
        """The lines, with the columns of :func:`candidate_schema`."""
        table = read_parquet(self.path / CANDIDATES, candidate_schema())
        if len(table) != self.manifest["lines"]:
            raise ValueError(
                f"{self.path / CANDIDATES}: must hold {self.manifest['lines']} lines, got "
                f"{len(table)}"
            )
        return table

    @cached_property
    def parts(self) -> list[Part]:
        """All files of verdicts, written or not."""
        settings = self.settings
        batches = batches_of(self.manifest["lines"], settings, self.number)
        names = [f"{self.number}-{i}" if self.shared else None for i in range(len(batches))]
        each = max(1, settings["lines_per_file"] // settings["batch_size"])
        return [
            Part(
                self.path.with_name(f"train-{self.number:05d}-{i // each:05d}.parquet"),
                batches[i : i + each],
                names[i : i + each],
            )
            for i in range(0, len(batches), each)
        ]

    @property
    def stamp(self) -> dict[str, str]:
        """What every file of verdicts repeats, so that it is not taken for one of others."""
        return {"reader": self.manifest["identity"], "lines": self.manifest["digest"]}


def shares_pools(settings: Mapping[str, Any]) -> bool:
    """Whether the lines of a batch share one pool."""
    return settings.get("pool") != "mined"


def batches_of(count: int, settings: Mapping[str, Any], number: int) -> list[list[int]]:
    """Which of ``count`` lines are read together.

    A line that would be left alone joins the batch before, where lines share a pool.

    Args:
        count: of the lines.
        settings: of the manifest.
        number: of the lines' folder.
    """
    order, size, shared = list(range(count)), settings["batch_size"], shares_pools(settings)
    # Lines beside each other in a file are often alike; where they should be, they are in order.
    if shared and not settings.get("neighbours"):
        random.Random(f"{settings.get('seed')}:{number}").shuffle(order)
    batches = [order[i : i + size] for i in range(0, count, size)]
    if shared and len(batches) > 1 and len(batches[-1]) == 1:
        left = batches.pop()
        batches[-1] += left
    return batches


def is_taught(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of ``dream teach``."""
    return (Path(path) / "lines-00000" / MANIFEST).is_file()


def taught_lines(folder: str | os.PathLike[str]) -> list[TaughtLines]:
    """Return the lines of a folder, in the order in which they were added; none if it has none.

    Raises:
        ValueError: a manifest is not one of this form.
    """
    found = []
    for path in sorted(Path(folder).glob("lines-" + "[0-9]" * 5)):
        manifest = read_json(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path / MANIFEST}: is no manifest of dream teach ({FORMAT!r})")
        for key, kind in _MANIFEST_KEYS.items():
            _check_value(manifest, key, kind, path / MANIFEST)
        for key in _COUNTS:
            _check_value(manifest["settings"], key, int, path / MANIFEST)
        if not all(layer.isdecimal() for layer in manifest["heads"]):
            raise ValueError(f"{path / MANIFEST}: heads must map layers to heads")
        found.append(TaughtLines(path, int(path.name[-5:]), manifest))
    return found


def _check_value(values: Mapping[str, Any], key: str, kind: type, path: Path) -> None:
    value = values.get(key)
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or (isinstance(value, int) and value < 1):
        raise ValueError(
            f"{path}: {key} must be {'a positive number' if kind is int else kind.__name__}, got "
            f"{shortened(value)}"
        )


def candidate_schema() -> pyarrow.Schema:
    """The columns of ``candidates.parquet``.

    ``digest`` is that of :func:`line_digest`, ``origins`` where each document comes from.
    """
    import pyarrow as pa

    texts = pa.list_(pa.string())
    names = ("query", "target", "documents", "origins", "positive", "digest")
    kinds = (pa.string(), pa.string(), texts, texts, pa.int64(), pa.string())
    return pa.schema(list(zip(names, kinds)))


def verdict_schema() -> pyarrow.Schema:
    """The columns of a file of verdicts.

    ``documents`` are the pool of the query, ``logits`` the teacher's, in nats, one for each;
    ``positive`` is the place of the known relevant document, -1 if it is not known, and
    ``positive_won`` whether it has the highest logit; ``batch`` names the lines that share a pool.
    """
    import pyarrow as pa

    texts = pa.list_(pa.string())
    return pa.schema(
        [
            ("query", pa.string()),
            ("target", pa.string()),
            ("documents", texts),
            ("logits", pa.list_(pa.float32())),
            ("positive", pa.int64()),
            ("positive_won", pa.bool_()),
            ("origins", texts),
            ("batch", pa.string()),
        ]
    )


def write_parquet(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    schema: pyarrow.Schema,
    stamp: Mapping[str, str] | None = None,
) -> None:
    """Write rows to a file, which is whole or absent.

    Raises:
        OSError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if stamp is not None:
        schema = schema.with_metadata({_METADATA: json.dumps(dict(stamp)).encode()})
    buffer = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    with open_whole(path, binary=True) as file:
        file.write(buffer.getvalue())


def read_parquet(
    path: Path, schema: pyarrow.Schema, stamp: Mapping[str, str] | None = None
) -> pyarrow.Table:
    """Read a file that :func:`write_parquet` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has other columns, or was written with another ``stamp``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
            table.validate(full=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is damaged: {shortened(str(error))}; delete it") from error
    if not table.schema.equals(schema):
        raise ValueError(
            f"{path}: its columns must be {', '.join(schema.names)} as dream teach writes them, "
            f"got {shortened(', '.join(table.schema.names))}"
        )
    if stamp is not None and _stamp_of(table) != dict(stamp):
        raise ValueError(
            f"{path}: was taught by another reader or from other lines than the manifest says: "
            "delete it, and run dream teach again"
        )
    return table


def _stamp_of(table: pyarrow.Table) -> Any:
    try:
        return json.loads((table.schema.metadata or {}).get(_METADATA, b"null"))
    except ValueError:
        return None


def _check_verdicts(table: pyarrow.Table, path: Path) -> None:
    """Raise ``ValueError`` unless every document has a finite logit, and positives are in range."""
    import pyarrow.compute as pc

    sizes = pc.list_value_length(table["documents"])
    whole = [table[name].null_count == 0 for name in ("query", "target", "positive")]
    inner = [pc.list_flatten(table[name]).null_count == 0 for name in ("documents", "logits")]
    equal = pc.equal(sizes, pc.list_value_length(table["logits"]))
    known = pc.and_(
        pc.less(table["positive"], sizes.cast("int64")), pc.greater_equal(table["positive"], -1)
    )
    finite = pc.is_finite(pc.list_flatten(table["logits"]))
    right = all(
        pc.all(found, skip_nulls=False).as_py()
        for found in (equal, known, finite, pc.greater(sizes, 0))
    )
    if not (all(whole) and all(inner) and right):
        raise ValueError(
            f"{path}: each line must have a query, a target, documents, a finite logit for each, "
            "and a positive that is one of them or -1"
        )


def line_digest(row: Mapping[str, Any]) -> str:
    """Return a digest of a line as it is given: query, target, documents, positive."""
    texts = [row["query"], row["target"], list(row["documents"]), row["positive"]]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def digests_of(lines: Sequence[TaughtLines]) -> set[str]:
    """The digests of all lines as they were given."""
    return {digest for own in lines for digest in own.candidates["digest"].to_pylist()}


def absent_parts(lines: Sequence[TaughtLines]) -> list[Part]:
    """The files of verdicts that are not written yet."""
    return [part for own in lines for part in own.parts if not part.path.exists()]


def verdict_tables(folder: str | os.PathLike[str]) -> Iterator[pyarrow.Table]:
    """Yield the verdicts that are there, file by file.

    Raises:
        FileNotFoundError: the folder is not one of ``dream teach``.
        ValueError: a file is damaged, or was taught by another reader.
    """
    lines = taught_lines(folder)
    if not lines:
        raise FileNotFoundError(f"taught {folder}: is no folder of dream teach")
    for own in lines:
        for part in own.parts:
            if part.path.exists():
                table = read_parquet(part.path, verdict_schema(), own.stamp)
                _check_verdicts(table, part.path)
                yield table


def read_taught(folder: str | os.PathLike[str]) -> Dataset:
    """Read a folder of ``dream teach`` as training data.

    Returns:
        A ``datasets.Dataset`` with ``query``, ``target``, ``documents``, ``logits`` (in nats),
        ``positive`` (-1 if it is not known), and where lines share a pool ``batch``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not complete, or a file in it is damaged.
    """
    import pyarrow as pa
    from datasets import Dataset

    lines = taught_lines(folder)
    absent = absent_parts(lines)
    if absent:
        count = sum(len(own.parts) for own in lines)
        raise ValueError(
            f"taught {folder}: {len(absent)} of {count} files are missing, the first is "
            f"{absent[0].path.name}: run dream teach again, which resumes"
        )
    columns = ["query", "target", "documents", "logits", "positive", "batch"]
    table = pa.concat_tables([own.select(columns) for own in verdict_tables(folder)])
    if table["batch"].null_count == len(table):
        table = table.drop_columns(["batch"])
    # Else the library would hash all of the table.
    stamps = json.dumps([own.stamp for own in lines])
    fingerprint = hashlib.blake2b(stamps.encode(), digest_size=8).hexdigest()
    return Dataset(table.replace_schema_metadata(None), fingerprint=fingerprint)
