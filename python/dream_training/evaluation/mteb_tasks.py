"""Retrieval tasks of ``mteb``, with the score of every query."""

from __future__ import annotations

import json
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_training.console import progress
from dream_training.evaluation.results import DROPPED, Evaluation
from dream_training.evaluation.retrieval import TOP_K, RetrievalTask, encoding, score_queries
from dream_training.models.texts import fixed_lengths, text_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.evaluation.options import EvaluationOptions

# Tasks in several languages: the subset that the English benchmarks use.
_SUBSETS = {"CUREv1": ["en"]}


def get_task(name: str) -> Any:
    """Return mteb's task of that name, without its data.

    Raises:
        ModuleNotFoundError: mteb is not installed.
        ValueError: mteb has no such retrieval task.
    """
    mteb = _import_mteb()
    try:
        task = mteb.get_task(name, hf_subsets=_SUBSETS.get(name))
    except KeyError as error:
        reason = str(error.args[0]).removeprefix("KeyError: ")
        raise ValueError(f"task {name!r}: mteb has no such task: {reason}") from None
    parts = getattr(task.metadata, "tasks", None)
    if parts:
        names = ",".join(part.metadata.name for part in parts)
        raise ValueError(f"task {name!r} is a collection; name its parts: {names}")
    if not isinstance(task, _retrieval_class()):
        raise ValueError(f"task {name!r} must be a retrieval task, got {task.metadata.type}")
    return task


def evaluate_mteb_task(
    model: SentenceTransformer, name: str, task: Any, options: EvaluationOptions
) -> Evaluation:
    """Evaluate a retriever on a task from :func:`get_task`.

    The figures are mteb's own; for a task with several splits or subsets, the mean over them. The
    score of a query is computed from mteb's ranking, and its id is prefixed with split and subset
    if there are several.

    Raises:
        FileNotFoundError: the data could not be fetched.
    """
    mteb = _import_mteb()
    if options.keep_identical_ids:
        task.ignore_identical_ids = False
    _load(task)
    home = model.device
    lengths = options.query_max_len, options.passage_max_len
    encode: dict[str, Any] = {"batch_size": options.batch_size, "show_progress_bar": False}
    if options.devices:
        encode["device"] = list(options.devices)
    try:
        with (
            fixed_lengths(model, *lengths),
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            encoding(model, f"for {name}", devices=options.devices),
        ):
            # Warnings about prompts and metadata that its leaderboard wants.
            warnings.simplefilter("ignore")
            # No cache: its key is the model's folder, whose content changes from run to run.
            result = mteb.evaluate(
                model, task, cache=None, encode_kwargs=encode, prediction_folder=folder,
                show_progress_bar=False,
            )  # fmt: skip
            text = (Path(folder) / task.prediction_file_name).read_text(encoding="utf-8")
    finally:
        model.to(home)
    rankings = json.loads(text)
    parts = [
        (split, scores["hf_subset"], scores)
        for split, every in result.task_results[0].scores.items()
        for scores in every
    ]
    queries: dict[str, float] = {}
    documents = dropped = 0
    for split, subset, _ in parts:
        data = task.dataset[subset][split]
        documents += len(data["corpus"])
        if task.ignore_identical_ids:
            dropped += len(set(data["queries"]["id"]) & set(data["corpus"]["id"]))
        prefix = f"{split}/{subset}/" if len(parts) > 1 else ""
        for query, value in _query_scores(task, data, rankings[subset][split]).items():
            queries[prefix + query] = value
    task.unload_data()
    return Evaluation(
        model=name,
        task=task.metadata.name,
        ndcg_at_10=statistics.fmean(scores[f"ndcg_at_{TOP_K}"] for *_, scores in parts),
        recall_at_10=statistics.fmean(scores[f"recall_at_{TOP_K}"] for *_, scores in parts),
        documents=documents,
        query_ndcg_at_10=queries,
        settings={
            "splits": sorted({split for split, *_ in parts}),
            "revision": task.metadata.dataset.get("revision"),
            "mteb": mteb.__version__,
            **text_settings(model, *lengths),
            DROPPED: dropped,
        },
    )


def _query_scores(
    task: Any, data: Mapping[str, Any], ranking: dict[str, dict[str, float]]
) -> dict[str, float]:
    """nDCG@10 by query id, without the documents that the task leaves out."""
    if task.ignore_identical_ids:
        ranking = {
            q: {d: score for d, score in found.items() if d != q} for q, found in ranking.items()
        }
    if getattr(task, "skip_first_result", False):
        ranking = {
            q: dict(sorted(found.items(), key=lambda item: -item[1])[1:])
            for q, found in ranking.items()
        }
    scores = score_queries(RetrievalTask({}, {}, data["relevant_docs"]), ranking)
    return {q: values[f"ndcg_at_{TOP_K}"] for q, values in scores.items()}


def _load(task: Any) -> None:
    """Load the data, with an error that names the task and what could not be fetched."""
    try:
        with warnings.catch_warnings(), progress(f"loading {task.metadata.name}"):
            warnings.simplefilter("ignore")
            task.load_data()
    except Exception as error:  # each of mteb, datasets, the hub and its network raises its own
        path = task.metadata.dataset.get("path")
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"task {task.metadata.name!r}: its data set {path!r} could not be fetched from the "
            f"hub: {type(error).__name__}: {reason}"
        ) from error


def _retrieval_class() -> type:
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    return AbsTaskRetrieval


def _import_mteb() -> Any:
    try:
        import mteb
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise ModuleNotFoundError("this task is one of mteb's: pip install 'mteb>=2'") from None
    return mteb
