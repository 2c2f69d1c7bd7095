"""``dream evaluate``: retrievers on tasks, as a table and as a file with every query's score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from dream_kernels.files import is_stream
from dream_training.console import (
    make_console,
    make_table,
    print_paths,
    short_names,
    show_on,
    shows_progress,
)
from dream_training.environment import describe_environment
from dream_training.evaluation.options import EvaluationOptions
from dream_training.evaluation.results import DROPPED, Evaluation, write_evaluations
from dream_training.evaluation.tasks import (
    check_tasks,
    evaluate_bm25,
    evaluate_task,
    expand_tasks,
    is_beir_folder,
    is_mteb_task,
)

# Of names this long, a table may show the beginning alone.
_LONG = 16


@shows_progress
def run_evaluate(
    arguments: Sequence[str],
    *,
    tasks: str,
    output: Path | None,
    options: EvaluationOptions,
    bm25: bool,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> list[Evaluation]:
    """Run the command; the arguments are its own.

    Args:
        arguments: models, and BEIR folders among them.
        tasks: more tasks, separated by commas.
        output: JSON file to write, ``-`` for standard output, where the table is not printed to.
        options: how to evaluate.
        bm25: evaluate BM25 on folders and sets of BEIR as well.
        trust_remote_code: run code that comes with a model.
        console: where to print.

    Raises:
        FileNotFoundError: a folder is missing, or data could not be fetched.
        ValueError: no model or no task is named, or a task is unknown.
    """
    from dream_training.models.retriever import load_sentence_transformer

    console = show_on(console or make_console(beside=output))
    folders = [name for name in arguments if is_beir_folder(name)]
    models = [name for name in arguments if name not in folders]
    names = expand_tasks([*folders, *(name for name in tasks.split(",") if name.strip())])
    if not models:
        raise ValueError("name at least one model; only BEIR folders were given")
    if not names:
        given = ", ".join(models)
        raise ValueError(f"name a task: --tasks, or a BEIR folder with a corpus.jsonl; got {given}")
    check_tasks(names)
    evaluations: list[Evaluation] = []
    for name in models:
        model = load_sentence_transformer(name, trust_remote_code=trust_remote_code)
        for task in names:
            evaluations.append(evaluate_task(model, name, task, options))
            # What took hours is kept when the next task fails.
            if output is not None and not is_stream(output):
                write_evaluations(output, evaluations, describe_environment(model.device))
    if bm25:
        evaluations += [evaluate_bm25(task, options) for task in names if not is_mteb_task(task)]
    print_table(console, evaluations)
    for task in names:
        dropped = max(e.settings.get(DROPPED, 0) for e in evaluations if e.task == task)
        if dropped:
            console.print(
                f"{task}: for {dropped:,} queries the document with the query's own id is not "
                "ranked; --keep-identical-ids ranks it",
                highlight=False,
                soft_wrap=True,
            )
    if output is not None:
        write_evaluations(output, evaluations, describe_environment(model.device))
        console.print(f"\nWith every query's score: {output}", soft_wrap=True)
    return evaluations


def print_table(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """Print one line for each model on each task, and each model's mean over its tasks."""
    table = make_table("task", "model", "nDCG@10", "recall@10", "queries", "documents", texts=2)
    tasks = list(dict.fromkeys(e.task for e in evaluations))
    models = list(dict.fromkeys(e.model for e in evaluations))
    shown = short_names([*tasks, *models])
    for task in tasks:
        for e in evaluations:
            if e.task == task:
                table.add_row(
                    shown[task], shown[e.model], f"{e.ndcg_at_10:.4f}", f"{e.recall_at_10:.4f}",
                    f"{len(e.query_ndcg_at_10):,}", f"{e.documents:,}",
                )  # fmt: skip
        table.add_section()
    for model in models:
        own = [e for e in evaluations if e.model == model]
        if len(tasks) > 1 and len(own) == len(tasks):
            ndcg = sum(e.ndcg_at_10 for e in own) / len(own)
            recall = sum(e.recall_at_10 for e in own) / len(own)
            table.add_row(
                f"mean of {len(own)}", shown[model], f"{ndcg:.4f}", f"{recall:.4f}", "", ""
            )
    console.print(table)
    whole = console.measure(table).maximum <= console.width
    legend = {name: path for path, name in shown.items() if name != path}
    cut = [n for n in shown.values() if not whole and len(n) > _LONG and n not in legend]
    if legend or cut:
        console.print()
        print_paths(console, {**legend, **dict.fromkeys(cut, "")})


def choose_devices(processes: int | None, devices: str) -> list[str] | None:
    """Return one device for each process: those named, or what there is.

    Raises:
        ValueError: both were given, or fewer GPUs are there than processes.
    """
    named = [device.strip() for device in devices.split(",") if device.strip()]
    if named and processes:
        raise ValueError("give --processes or --devices, not both")
    if named:
        return [str(torch.device(device)) for device in named]
    if processes is None or processes == 1:
        return None
    if not torch.cuda.is_available():
        return ["cpu"] * processes
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"processes must be at most {torch.cuda.device_count()}, one for each GPU, got "
            f"{processes}"
        )
    return [f"cuda:{i}" for i in range(processes)]
