"""Tasks by name: BEIR folders, BEIR's published sets, mteb's tasks, and presets of those."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dream_training.data.beir_folder import is_beir_folder, read_beir_folder
from dream_training.data.training_row import normalised
from dream_training.evaluation.options import EvaluationOptions
from dream_training.evaluation.results import BM25, Evaluation, retrieval_settings
from dream_training.evaluation.retrieval import (
    RetrievalEvaluator,
    RetrievalTask,
    score_queries,
    search_bm25,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

BEIR_PREFIX = "beir:"

# beir9: the paper reports nine sets of BEIR; which ones is not known to us. These nine are public
# and the ones that papers mostly report; the choice is ours.
# rteb14: the open tasks of mteb's "RTEB(eng, beta)" without SWEbenchCodeRetrieval are exactly
# fourteen, so probably the paper's.
PRESETS: dict[str, tuple[str, ...]] = {
    "beir9": (
        "ArguAna", "FiQA2018", "HotpotQA", "NFCorpus", "NQ", "QuoraRetrieval", "SCIDOCS",
        "SciFact", "TRECCOVID",
    ),
    "rteb14": (
        "AILACasedocs", "AILAStatutes", "LegalSummarization", "FinanceBenchRetrieval",
        "HC3FinanceRetrieval", "FinQARetrieval", "AppsRetrieval", "DS1000Retrieval",
        "HumanEvalRetrieval", "MBPPRetrieval", "WikiSQLRetrieval", "FreshStackRetrieval",
        "ChatDoctorRetrieval", "CUREv1",
    ),
}  # fmt: skip


def expand_tasks(names: Iterable[str]) -> list[str]:
    """Replace presets by their tasks, and drop repetitions.

    Raises:
        ValueError: a name is empty.
    """
    tasks: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a task must be a name, got {name!r}")
        tasks.update(dict.fromkeys(PRESETS.get(name.strip(), (name.strip(),))))
    return list(tasks)


def is_mteb_task(task: str) -> bool:
    """Whether a task is one of mteb's: neither a BEIR folder nor a ``beir:`` set.

    Raises:
        FileNotFoundError: ``task`` looks like a path, and there is no BEIR folder.
    """
    if is_beir_folder(task) or task.startswith(BEIR_PREFIX):
        return False
    if "/" in task or task.startswith(".") or Path(task).exists():
        raise FileNotFoundError(f"task {task!r}: there is no BEIR folder with a corpus.jsonl")
    return True


def check_tasks(tasks: Iterable[str]) -> None:
    """Check names before hours of training; downloads nothing.

    Raises:
        FileNotFoundError: a task looks like a path, and there is no BEIR folder.
        ModuleNotFoundError: mteb is needed and not installed.
        ValueError: neither mteb nor ``beir`` has such a task.
    """
    from dream_training.evaluation.beir_sets import check_name
    from dream_training.evaluation.mteb_tasks import get_task

    for task in expand_tasks(tasks):
        if is_mteb_task(task):
            get_task(task)
        elif task.startswith(BEIR_PREFIX):
            check_name(task.removeprefix(BEIR_PREFIX))


def load_task(task: str, options: EvaluationOptions) -> RetrievalTask:
    """Read a BEIR folder, or a set of BEIR, which is downloaded if it is not in the cache.

    Raises:
        FileNotFoundError: a file is missing, or the set could not be fetched.
        ValueError: a line of a file cannot be read; see :func:`read_beir_folder`.
    """
    folder = Path(task)
    if task.startswith(BEIR_PREFIX):
        from dream_training.evaluation.beir_sets import fetch

        folder = fetch(task.removeprefix(BEIR_PREFIX), options.cache_dir)
    return read_task(folder, options.split, options.keep_identical_ids)


def read_task(
    folder: str | os.PathLike[str], split: str, keep_identical_ids: bool = False
) -> RetrievalTask:
    """Read a BEIR folder as a task; raises as :func:`read_beir_folder`.

    Warns if queries and documents share ids by chance: documents of another text are left out.
    """
    corpus, queries, qrels = read_beir_folder(folder, split)
    if not any(grade > 0 for judged in qrels.values() for grade in judged.values()):
        raise ValueError(f"{os.fspath(folder)}: qrels/{split}.tsv calls no document relevant")
    task = RetrievalTask(queries, corpus, qrels, keep_identical_ids)
    # A query that is a document comes after its title, if there is one.
    others = sum(not normalised(corpus[q]).endswith(normalised(queries[q])) for q in task.left_out)
    if others:
        _warn_once(
            f"{os.fspath(folder)}: {others} of {len(queries)} queries share their id with a "
            "document of another text, which is not ranked for them, as in beir's own evaluation; "
            "if the ids are equal by chance, set --keep-identical-ids (keep_identical_ids=true in "
            "a config)"
        )
    return task


@lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    logger.warning(text)


def evaluate_task(
    model: SentenceTransformer, name: str, task: str, options: EvaluationOptions
) -> Evaluation:
    """Evaluate a retriever on one task.

    Args:
        model: the retriever.
        name: how the retriever is called in the result.
        task: a BEIR folder, ``beir:`` and the name of one of BEIR's sets, or the name of a
            retrieval task of mteb.
        options: how it is evaluated.

    Raises:
        FileNotFoundError: a folder is missing, or data could not be fetched.
        ModuleNotFoundError: mteb is needed and not installed.
        ValueError: there is no such task, or its data cannot be read.
    """
    if is_mteb_task(task):
        from dream_training.evaluation.mteb_tasks import evaluate_mteb_task, get_task

        return evaluate_mteb_task(model, name, get_task(task), options)
    data = load_task(task, options)
    evaluator = RetrievalEvaluator(
        data,
        options.query_max_len,
        options.passage_max_len,
        options.batch_size,
        options.devices,
    )
    evaluator(model)
    settings = retrieval_settings(
        model,
        data,
        split=options.split,
        query_max_len=options.query_max_len,
        passage_max_len=options.passage_max_len,
        path=_path_of(task),
    )
    return Evaluation.from_scores(name, task, data, evaluator.query_scores, settings)


def evaluate_bm25(task: str, options: EvaluationOptions) -> Evaluation:
    """Evaluate BM25 on a BEIR folder or set; raises as :func:`load_task`."""
    data = load_task(task, options)
    scores = score_queries(data, search_bm25(data))
    settings = retrieval_settings(None, data, split=options.split, path=_path_of(task))
    return Evaluation.from_scores(BM25, task, data, scores, settings)


def _path_of(task: str) -> str | None:
    """The folder of a task; None for a set of BEIR, whose name says what it is."""
    return None if task.startswith(BEIR_PREFIX) else task
