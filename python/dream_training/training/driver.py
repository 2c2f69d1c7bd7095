"""The thin driver: config in, sentence-transformers trainer, retriever out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dream_kernels import HeadFile, read_heads, write_heads
from dream_training.config import TrainConfig
from dream_training.data.beir_folder import read_beir_folder
from dream_training.data.jsonl import read_training_data, stream_training_data
from dream_training.distributed import world
from dream_training.distributed.engine import check_trainer, engine_arguments
from dream_training.evaluation import RetrievalEvaluator, RetrievalTask, sample_queries
from dream_training.evaluation.tasks import check_tasks
from dream_training.heads.selection import (
    HEAD_EXAMPLES,
    WITHOUT_LABELS,
    head_examples,
    select_heads,
)
from dream_training.json_file import write_json
from dream_training.models.loading import load_reader, make_retriever
from dream_training.models.retriever import save_retriever
from dream_training.objectives.build import Objective, build_objective
from dream_training.objectives.temperature import Temperature
from dream_training.plots import plot_curve, plot_heads
from dream_training.training.callbacks import (
    History,
    KeepBestCallback,
    ProgressCallback,
    TemperatureCallback,
)
from dream_training.training.run_record import RunRecord

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

# Lines of a stream that are shuffled together.
STREAM_BUFFER = 1000


@dataclass
class TrainResult:
    """What a run leaves behind.

    Attributes:
        model: the retriever after the last step.
        path: the folder to load: the best model, or the last where nothing was evaluated.
        history: losses and evaluations.
        interrupted: whether Ctrl-C ended the run.
        seconds: duration of the training, evaluations included.
    """

    model: SentenceTransformer
    path: Path
    history: History
    interrupted: bool
    seconds: float


def load_training_data(config: TrainConfig) -> Dataset | IterableDataset:
    """Read the training data that a config names; a stream if it says so, shuffled.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: a line is not valid; the message names file and line.
    """
    options: dict[str, Any] = {
        "split": config.train_split,
        "target_from": config.target_from,
        "positives": config.train_positives,
    }
    if config.streaming:
        stream = stream_training_data(config.train_data, **options)
        return stream.shuffle(seed=config.seed, buffer_size=STREAM_BUFFER)
    return read_training_data(config.train_data, **options)


def find_heads(
    config: TrainConfig, data: Dataset | IterableDataset, examples: int = HEAD_EXAMPLES
) -> HeadFile:
    """Read the head file that a config names, or select heads on the data.

    Args:
        config: names the file, or the criterion.
        data: training data to select on.
        examples: how many of its lines are looked at.

    Raises:
        FileNotFoundError: there is no such head file.
        ValueError: the file is not valid, or the data lacks what the criterion needs.
    """
    if config.heads != "auto":
        return read_heads(config.heads)
    criterion = config.head_criterion
    return select_heads(
        load_reader(config, {}),
        head_examples(data, examples, config.seed, labelled=criterion not in WITHOUT_LABELS),
        criterion=criterion,
        seed=config.seed,
        data_name=config.train_data,
        reader_name=config.reader,
    )


def make_evaluator(config: TrainConfig) -> RetrievalEvaluator | None:
    """Read the BEIR folder that a config evaluates on, if it names one."""
    if config.eval_data is None:
        return None
    corpus, queries, qrels = read_beir_folder(config.eval_data, config.eval_split)
    task = sample_queries(RetrievalTask(queries, corpus, qrels), config.eval_queries, config.seed)
    return RetrievalEvaluator(task, config.query_max_len, config.passage_max_len)


def train(
    config: TrainConfig,
    *,
    data: Dataset | IterableDataset | None = None,
    evaluator: RetrievalEvaluator | None = None,
    heads: HeadFile | None = None,
    model: SentenceTransformer | None = None,
    console: Console | None = None,
    evaluate_first: bool = True,
    history: History | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train a retriever.

    Writes ``best/`` and ``last/`` (both load with ``SentenceTransformer(path)``), ``heads.yaml``,
    ``config.json``, ``history.json`` and ``curve.png`` to ``config.output_dir``, and for
    ``dream report`` what :class:`~dream_training.training.run_record.RunRecord` names. Ctrl-C stops
    after the current step and keeps what there is.

    Started by ``torchrun`` or ``accelerate launch``, the processes train together: each with
    ``batch_size`` queries of its own in every step, as ``config`` says what they share. Process 0
    writes and prints; the result is the same in all of them.

    Args:
        config: the run.
        data: training data; read from ``config.train_data`` by default.
        evaluator: what to evaluate with; made from ``config.eval_data`` by default.
        heads: the reader's heads; from ``config.heads`` by default.
        model: the untrained retriever; built from the config by default.
        console: where to print.
        evaluate_first: evaluate before the first step too.
        history: what was measured before; the run adds to it.
        callbacks: the trainer's, beside the run's own.

    Raises:
        FileNotFoundError: a file of the config is missing.
        ValueError: something in config or data does not fit; the message says what.
    """
    given = asdict(config)
    config = replace(config, device=world.join(config.device, config.distributed_timeout))
    console = (console or Console()) if world.is_main() else Console(quiet=True)
    output_dir = Path(config.output_dir)
    data = load_training_data(config) if data is None else data
    lines = config.batch_size * world.size()
    if not _is_stream(data) and len(data) < lines:
        raise ValueError(
            f"train_data must hold at least one batch of {lines} lines, got {len(data)}"
        )
    if evaluator is None:
        evaluator = make_evaluator(config)
    check_tasks(config.final_tasks or [])
    if world.is_main():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "config.json", given)
    if model is None:
        model = make_retriever(config)
    objective = build_objective(
        config, model, data, lambda: _choose_heads(config, data, heads, output_dir, console)
    )
    history = history or History()
    record = RunRecord(config, model, data, objective.loss, evaluator, history)
    progress = ProgressCallback(objective.loss, history, console, config.log_steps)
    keeper = KeepBestCallback(model, history, output_dir, console)
    trainer = _trainer(config, model, objective, evaluator, evaluate_first)
    for callback in (progress, keeper, record, *callbacks):
        trainer.add_callback(callback)
    temperature = getattr(objective.loss, "temperature", None)
    if isinstance(temperature, Temperature):
        trainer.add_callback(TemperatureCallback(temperature))
    start = time.perf_counter()
    interrupted = False
    try:
        trainer.train()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.close()
    seconds = time.perf_counter() - start
    save_retriever(model, output_dir / "last")
    path = keeper.best_path or output_dir / "last"
    if world.is_main():
        write_json(
            output_dir / "history.json",
            {"steps": history.steps, "evaluations": history.evaluations},
        )
        plot_curve(history, output_dir / "curve.png")
    if interrupted:
        console.print(f"Interrupted after {len(history.steps)} steps; the retriever is in {path}")
    record.finish(path, console, interrupted)
    return TrainResult(model, path, history, interrupted, seconds)


def _is_stream(data: Any) -> bool:
    return not hasattr(data, "__len__")


def _choose_heads(
    config: TrainConfig,
    data: Dataset | IterableDataset,
    heads: HeadFile | None,
    output_dir: Path,
    console: Console,
) -> dict[int, list[int]]:
    """The heads that receive the scores: given, read or selected; written and drawn."""

    def choose(heads: HeadFile | None) -> list[list[Any]]:
        if heads is None:
            if config.heads == "auto":
                console.print("selecting the reader's heads ...")
            heads = find_heads(config, data)
        if world.is_main():
            if heads.scores:
                plot_heads(heads, output_dir / "heads.png", config.top_k or len(heads.heads))
            write_heads(output_dir / "heads.yaml", heads)
        return [[layer, own] for layer, own in heads.by_layer(config.top_k).items()]

    # A reader that is cut over the processes needs all of them to run.
    if config.heads == "auto" and heads is None and config.reader_sharding == "sharded":
        chosen = world.broadcast_json(choose(None))
    else:
        chosen = world.on_main(lambda: choose(heads))
    return dict(chosen)


def _trainer(
    config: TrainConfig,
    model: SentenceTransformer,
    objective: Objective,
    evaluator: RetrievalEvaluator | None,
    evaluate_first: bool,
) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import PrinterCallback, set_seed

    from dream_training.distributed.trainer import Trainer

    set_seed(config.seed)
    evaluate: dict[str, Any] = {}
    if evaluator is not None:
        evaluate = {
            "eval_strategy": "steps",
            "eval_steps": config.eval_steps,
            "eval_on_start": evaluate_first,
        }
    args = SentenceTransformerTrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=str(model.device) == "cpu",
        dataloader_drop_last=True,
        # Batches of a stream would be cut to as many documents as there are queries.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        batch_sampler="no_duplicates" if objective.no_duplicates else "batch_sampler",
        prompts={"query": config.query_prompt, "positive": config.document_prompt},
        **evaluate,
        **engine_arguments(config),
    )
    # A card without widget examples would have the trainer make some from the training columns.
    model.model_card_data.widget = [{}]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=objective.data,
        loss=objective.loss,
        evaluator=evaluator,
        data_collator=objective.collator,  # duck-typed by the trainer
    )
    check_trainer(config, trainer)
    trainer.remove_callback(PrinterCallback)
    model.model_card_data.widget = []
    return trainer
