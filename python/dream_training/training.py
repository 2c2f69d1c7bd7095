"""The thin driver: config in, sentence-transformers trainer, retriever out."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dream_kernels import HeadFile, read_heads, write_heads
from dream_training.callbacks import (
    History,
    KeepBestCallback,
    ProgressCallback,
    TemperatureCallback,
)
from dream_training.config import TrainConfig
from dream_training.data.beir_folder import read_beir_folder
from dream_training.data.jsonl import read_training_data
from dream_training.evaluation import RetrievalEvaluator, RetrievalTask
from dream_training.heads import select_heads
from dream_training.loading import load_reader, make_retriever
from dream_training.objectives.build import Objective, build_objective
from dream_training.plots import plot_curve, plot_heads
from dream_training.retriever import save_retriever
from dream_training.temperature import Temperature

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

HEAD_EXAMPLES = 96
HEAD_POOL = 16


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


def known_pairs(data: Dataset, examples: int, seed: int) -> list[tuple[str, str]]:
    """Draw (query, relevant document) pairs for head selection.

    Raises:
        ValueError: fewer than two examples of ``data`` know their relevant document.
    """
    known = [row for row, positive in enumerate(data["positive"]) if positive >= 0]
    if len(known) < 2:
        raise ValueError(
            "selecting heads needs training lines with a known positive, and there are "
            f'{len(known)}: mark some with "positive": true, or name a head file'
        )
    chosen = random.Random(seed).sample(known, min(examples, len(known)))
    rows = [data[row] for row in chosen]
    return [(row["query"], row["documents"][row["positive"]]) for row in rows]


def make_evaluator(config: TrainConfig) -> RetrievalEvaluator | None:
    """Read the BEIR folder that a config evaluates on, if it names one."""
    if config.eval_data is None:
        return None
    corpus, queries, qrels = read_beir_folder(config.eval_data, config.eval_split)
    task = RetrievalTask(queries, corpus, qrels)
    return RetrievalEvaluator(task, config.query_max_len, config.passage_max_len)


def train(
    config: TrainConfig,
    *,
    data: Dataset | None = None,
    evaluator: RetrievalEvaluator | None = None,
    heads: HeadFile | None = None,
    model: SentenceTransformer | None = None,
    console: Console | None = None,
    evaluate_first: bool = True,
    history: History | None = None,
) -> TrainResult:
    """Train a retriever.

    Writes ``best/`` and ``last/`` (both load with ``SentenceTransformer(path)``), ``heads.yaml``,
    ``config.json``, ``history.json`` and ``curve.png`` to ``config.output_dir``. Ctrl-C stops
    after the current step and keeps what there is.

    Args:
        config: the run.
        data: training data; read from ``config.train_data`` by default.
        evaluator: what to evaluate with; made from ``config.eval_data`` by default.
        heads: the reader's heads; from ``config.heads`` by default.
        model: the untrained retriever; built from the config by default.
        console: where to print.
        evaluate_first: evaluate before the first step too.
        history: what was measured before; the run adds to it.

    Raises:
        FileNotFoundError: a file of the config is missing.
        ValueError: something in config or data does not fit; the message says what.
    """
    console = console or Console()
    output_dir = Path(config.output_dir)
    data = read_training_data(config.train_data) if data is None else data
    if len(data) < config.batch_size:
        raise ValueError(
            f"train_data must hold at least one batch of {config.batch_size} lines, got {len(data)}"
        )
    if evaluator is None:
        evaluator = make_evaluator(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "config.json", asdict(config))
    if model is None:
        model = make_retriever(config)
    objective = build_objective(
        config, model, data, lambda: _choose_heads(config, data, heads, output_dir, console)
    )
    history = history or History()
    progress = ProgressCallback(objective.loss, history, console, config.log_steps)
    keeper = KeepBestCallback(model, history, output_dir, console)
    trainer = _trainer(config, model, objective, evaluator, evaluate_first)
    for callback in (progress, keeper):
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
    save_retriever(model, output_dir / "last")
    path = keeper.best_path or output_dir / "last"
    write_json(
        output_dir / "history.json",
        {"steps": history.steps, "evaluations": history.evaluations},
    )
    plot_curve(history, output_dir / "curve.png")
    if interrupted:
        console.print(f"Interrupted after {len(history.steps)} steps; the retriever is in {path}")
    return TrainResult(model, path, history, interrupted, time.perf_counter() - start)


def _choose_heads(
    config: TrainConfig,
    data: Dataset,
    heads: HeadFile | None,
    output_dir: Path,
    console: Console,
) -> dict[int, list[int]]:
    """The heads that receive the scores: given, read or selected; written and drawn."""
    if heads is None:
        if config.heads == "auto":
            console.print("selecting the reader's heads ...")
            heads = select_heads(
                load_reader(config, {}),
                known_pairs(data, HEAD_EXAMPLES, config.seed),
                pool_size=HEAD_POOL,
                data_name=config.train_data,
                reader_name=config.reader,
            )
        else:
            heads = read_heads(config.heads)
    if heads.scores:
        plot_heads(heads, output_dir / "heads.png", config.top_k or len(heads.heads))
    write_heads(output_dir / "heads.yaml", heads)
    return heads.by_layer(config.top_k)


def _trainer(
    config: TrainConfig,
    model: SentenceTransformer,
    objective: Objective,
    evaluator: RetrievalEvaluator | None,
    evaluate_first: bool,
) -> Any:
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from transformers import PrinterCallback, set_seed

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
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        batch_sampler="no_duplicates" if objective.no_duplicates else "batch_sampler",
        prompts={"query": config.query_prompt, "positive": config.document_prompt},
        **evaluate,
    )
    # A card without widget examples would have the trainer make some from the training columns.
    model.model_card_data.widget = [{}]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=objective.data,
        loss=objective.loss,
        evaluator=evaluator,
        data_collator=objective.collator,  # type: ignore[arg-type]  # duck-typed by the trainer
    )
    trainer.remove_callback(PrinterCallback)
    model.model_card_data.widget = []
    return trainer


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON; an existing file is replaced as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
