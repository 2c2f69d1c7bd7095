"""Results of an evaluation query by query, and the file by which runs are compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels.parsing import shortened
from dream_training.evaluation.retrieval import TOP_K, RetrievalTask, average
from dream_training.json_file import read_json, write_json
from dream_training.models.texts import text_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FILE_NAME = "evaluation.json"
# In the settings: number of queries whose document of the same id was not ranked.
DROPPED = "identical_ids_dropped"
_LARGEST = 1e15
# Settings that say where a figure comes from and do not affect it.
_INCIDENTAL = frozenset({"step", "mteb", "path"})
# Names in results that are not trained models.
BM25, UNTRAINED = "BM25", "untrained"
_NDCG, _RECALL = f"ndcg_at_{TOP_K}", f"recall_at_{TOP_K}"


@dataclass(frozen=True)
class Evaluation:
    """One retriever on one task.

    Attributes:
        model: folder or hub name of the retriever, or another name such as ``BM25``.
        task: name of the task, or the BEIR folder.
        ndcg_at_10: mean over the queries, or over the means of a task's parts.
        recall_at_10: likewise.
        documents: size of the corpus.
        query_ndcg_at_10: nDCG@10 by query id.
        settings: what else affects the figures: split, lengths, digests of the data, ..., and the
            path of the data. An older file may lack some.
    """

    model: str
    task: str
    ndcg_at_10: float
    recall_at_10: float
    documents: int
    query_ndcg_at_10: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_scores(
        cls,
        model: str,
        task: str,
        data: RetrievalTask,
        scores: Mapping[str, Mapping[str, float]],
        settings: Mapping[str, Any],
    ) -> Evaluation:
        """Make one from the scores of every query."""
        means = average(scores)
        return cls(
            model=model,
            task=task,
            ndcg_at_10=means[_NDCG],
            recall_at_10=means[_RECALL],
            documents=len(data.corpus),
            query_ndcg_at_10={q: values[_NDCG] for q, values in scores.items()},
            settings=settings,
        )


def retrieval_settings(
    model: SentenceTransformer | None,
    data: RetrievalTask,
    *,
    split: str,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
    path: str | os.PathLike[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return what affects the figures of a retriever on given queries and documents.

    Every place that evaluates takes its settings from here, so that figures can be compared.

    Args:
        model: the retriever; None for BM25, which has neither lengths nor prompts nor similarity.
        data: queries, documents and relevance.
        split: of the queries.
        query_max_len: tokens of a query; the model's own limit by default.
        passage_max_len: tokens of a document; likewise.
        path: the folder of the data.
        more: other settings.
    """
    settings: dict[str, Any] = {
        "metric": f"nDCG@{TOP_K}",
        "split": split,
        "documents": len(data.corpus),
        "queries": len(data.queries),
        "documents_digest": _digest(data.corpus),
        "queries_digest": _digest(data.queries),
        "relevance_digest": _digest(data.qrels),
        DROPPED: len(data.left_out),
    }
    if path is not None:
        settings["path"] = os.path.realpath(path)
    if model is not None:
        settings |= text_settings(model, query_max_len, passage_max_len)
    return settings | more


def _digest(values: Mapping[str, Any]) -> str:
    """A digest of ids and their values, in any order."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(values):
        digest.update(json.dumps([key, values[key]], sort_keys=True).encode())
    return digest.hexdigest()


def is_same_task(a: Evaluation, b: Evaluation) -> bool:
    """Whether two evaluations have the same name, folder, or data."""
    if a.task == b.task or (_folder(a) == _folder(b) is not None):
        return True
    keys = ("documents_digest", "queries_digest", "relevance_digest")
    return all(a.settings.get(key) == b.settings.get(key) is not None for key in keys)


def _folder(evaluation: Evaluation) -> str | None:
    path = evaluation.settings.get("path")
    if path is None and Path(evaluation.task).is_dir():
        path = os.path.realpath(evaluation.task)
    return path


@dataclass(frozen=True)
class Differences:
    """How the settings of two evaluations differ.

    Attributes:
        different: the values of both, by key.
        unknown: keys that only one of them has.
    """

    different: Mapping[str, tuple[Any, Any]]
    unknown: Sequence[str]

    def __str__(self) -> str:
        return "; ".join(
            f"{key} is {a!r} in the first and {b!r} in the second"
            for key, (a, b) in self.different.items()
        )


def compare_settings(a: Evaluation, b: Evaluation) -> Differences:
    """Compare what affects the figures; BM25 has no lengths and prompts, which is no difference."""
    first, second = ({**e.settings, "documents": e.documents} for e in (a, b))
    keys = [key for key in {**first, **second} if key not in _INCIDENTAL]
    shared = [key for key in keys if key in first and key in second]
    unknown = [key for key in keys if key not in shared]
    if BM25 in (a.model, b.model):
        unknown = []
    return Differences(
        {key: (first[key], second[key]) for key in shared if first[key] != second[key]}, unknown
    )


def write_evaluations(
    path: str | os.PathLike[str],
    evaluations: Sequence[Evaluation],
    environment: Mapping[str, Any],
) -> Path:
    """Write evaluations and their environment as JSON."""
    path = Path(path)
    rows = [asdict(evaluation) for evaluation in evaluations]
    write_json(path, {"evaluations": rows, "environment": environment})
    return path


def read_evaluations(path: str | os.PathLike[str]) -> list[Evaluation]:
    """Read what :func:`write_evaluations` wrote.

    Args:
        path: the file, or the folder of a run that holds ``evaluation.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has other content; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    rows = read_json(path).get("evaluations")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list named 'evaluations'")
    return [_parse(row, f"{path}: evaluations[{i}]") for i, row in enumerate(rows)]


def _parse(row: Any, where: str) -> Evaluation:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, got {type(row).__name__}")
    try:
        evaluation = Evaluation(**row)
    except TypeError as error:
        reason = str(error).removeprefix("Evaluation.__init__() ")
        raise ValueError(f"{where}: {reason[:200]}") from None
    for name in ("model", "task"):
        value = getattr(evaluation, name)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be a text, got {shortened(value)}")
    for name in ("ndcg_at_10", "recall_at_10", "documents"):
        value = getattr(evaluation, name)
        if not _is_number(value):
            raise ValueError(f"{where}: {name} must be a number, got {shortened(value)}")
    if not isinstance(evaluation.settings, dict):
        got = shortened(evaluation.settings)
        raise ValueError(f"{where}: settings must be an object, got {got}")
    queries = evaluation.query_ndcg_at_10
    if not isinstance(queries, dict) or not queries:
        raise ValueError(f"{where}: query_ndcg_at_10 must hold at least one query")
    for query, value in queries.items():
        if not _is_number(value):
            raise ValueError(
                f"{where}: nDCG@10 of query {shortened(query)} must be a number, "
                f"got {shortened(value)}"
            )
    return evaluation


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _LARGEST  # not of NaN; JSON knows no limit of whole numbers
