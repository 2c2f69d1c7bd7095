"""``dream evaluate``: retrievers on tasks, as a table and as a file with every query's score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dream_training.commands.options import TrustRemoteCode
from dream_training.console import loading_libraries, make_console, show_on, shows_progress

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL|FOLDER",
        help="sentence-transformers models (folder or hub name), and BEIR folders",
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        help="separated by commas: names of mteb's retrieval tasks, beir:NAME for a set that "
        "BEIR publishes, BEIR folders, beir9 (nine public sets of BEIR that papers often "
        "report; which nine the DREAM paper used is not known to us), rteb14 (RTEB's English "
        "open tasks)"
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(help="JSON file for all figures, those of every query too; - for standard output"),
]
QueryMaxLen = Annotated[
    int | None, typer.Option(min=1, help="tokens of a query; the model's own limit by default")
]
PassageMaxLen = Annotated[
    int | None, typer.Option(min=1, help="tokens of a document; the model's own limit by default")
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="processes that encode documents, one for each GPU if any"),
]
Devices = Annotated[
    str, typer.Option(help="one process for each of these devices instead: cuda:0,cuda:1")
]
CacheDir = Annotated[Path | None, typer.Option(help="cache folder of BEIR's sets")]
KeepIdenticalIds = Annotated[
    bool,
    typer.Option(
        "--keep-identical-ids",
        help="rank the document that has a query's id too; by default only where it is "
        "relevant, as beir and mteb's tasks leave out queries that are documents themselves",
    ),
]


@shows_progress
def evaluate(
    arguments: Arguments,
    tasks: Tasks = "",
    output: Results = None,
    split: Annotated[str, typer.Option(help="qrels/<split>.tsv of BEIR folders")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="texts encoded at once")] = 32,
    query_max_len: QueryMaxLen = None,
    passage_max_len: PassageMaxLen = None,
    processes: Processes = None,
    devices: Devices = "",
    cache_dir: CacheDir = None,
    keep_identical_ids: KeepIdenticalIds = False,
    bm25: Annotated[bool, typer.Option(help="evaluate BM25 on BEIR folders as well")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print nDCG@10 and recall@10 of retrievers on BEIR folders and mteb tasks."""
    with loading_libraries():
        from dream_kernels.files import is_stream
        from dream_training.data.beir_folder import is_beir_folder
        from dream_training.environment import describe_environment
        from dream_training.evaluation import tasks as known
        from dream_training.evaluation import write_evaluations
        from dream_training.evaluation.options import EvaluationOptions, choose_devices
        from dream_training.evaluation.tables import print_left_out, print_table
        from dream_training.models.retriever import load_sentence_transformer

    options = EvaluationOptions(
        split=split, batch_size=batch_size, query_max_len=query_max_len,
        passage_max_len=passage_max_len, devices=choose_devices(processes, devices),
        cache_dir=cache_dir, keep_identical_ids=keep_identical_ids,
    )  # fmt: skip
    console = show_on(make_console(beside=output))
    folders = [name for name in arguments if is_beir_folder(name)]
    models = [name for name in arguments if name not in folders]
    names = known.expand_tasks([*folders, *(name for name in tasks.split(",") if name.strip())])
    if not models:
        raise ValueError("name at least one model; only BEIR folders were given")
    if not names:
        given = ", ".join(models)
        raise ValueError(f"name a task: --tasks, or a BEIR folder with a corpus.jsonl; got {given}")
    known.check_tasks(names)
    evaluations = []
    for name in models:
        model = load_sentence_transformer(name, trust_remote_code=trust_remote_code)
        for task in names:
            evaluations.append(known.evaluate_task(model, name, task, options))
            # What took hours is kept when the next task fails.
            if output is not None and not is_stream(output):
                write_evaluations(output, evaluations, describe_environment(model.device))
    if bm25:
        evaluations += [
            known.evaluate_bm25(task, options) for task in names if not known.is_mteb_task(task)
        ]
    print_table(console, evaluations)
    print_left_out(console, evaluations)
    if output is not None:
        write_evaluations(output, evaluations, describe_environment(model.device))
        console.print(f"\nWith every query's score: {output}", soft_wrap=True)
