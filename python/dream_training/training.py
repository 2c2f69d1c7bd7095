"""The thin driver: config in, sentence-transformers trainer, retriever out."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dream_kernels import HeadFile, read_heads, write_heads
from dream_training.callbacks import History, KeepBestCallback, ProgressCallback
from dream_training.collator import DreamCollator
from dream_training.config import TrainConfig
from dream_training.data.beir_folder import read_beir_folder
from dream_training.data.jsonl import read_training_data
from dream_training.evaluation import RetrievalEvaluator, RetrievalTask, sample_queries
from dream_training.evaluation.tasks import check_tasks
from dream_training.heads import select_heads
from dream_training.json_file import write_json
from dream_training.losses import DreamLoss
from dream_training.plots import plot_curve, plot_heads
from dream_training.reader import Reader
from dream_training.retriever import build_retriever, save_retriever
from dream_training.run_record import RunRecord
from dream_training.smollm2 import smollm2_path

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

PACKAGED_READER = "smollm2"
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


def resolve_model(name: str, dtype: str = "auto") -> str:
    """Return the path behind the name of a model: ``smollm2`` stands for the packaged one."""
    if name != PACKAGED_READER:
        return name
    return str(smollm2_path(dtype))


def load_reader(config: TrainConfig, heads: Any) -> Reader:
    """Load the frozen reader that a config names."""
    return Reader.from_pretrained(
        resolve_model(config.reader, config.dtype),
        heads,
        dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        trust_remote_code=config.trust_remote_code,
        context=config.context,
        mode=config.mode,
        document_mass=config.document_mass,
        query_max_len=config.query_max_len,
        passage_max_len=config.passage_max_len,
        target_max_len=config.target_max_len,
    )


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
    task = sample_queries(RetrievalTask(queries, corpus, qrels), config.eval_queries, config.seed)
    return RetrievalEvaluator(task, config.query_max_len, config.passage_max_len)


def make_retriever(config: TrainConfig) -> SentenceTransformer:
    """Build the untrained retriever of a config."""
    torch.manual_seed(config.seed)
    return build_retriever(
        resolve_model(config.retriever, config.dtype),
        layers=config.retriever_layers,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        max_len=config.passage_max_len,
        dtype=config.dtype,
        device=config.device,
        prompts={"query": config.query_prompt, "document": config.document_prompt},
        trust_remote_code=config.trust_remote_code,
    )


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
    ``config.json``, ``history.json`` and ``curve.png`` to ``config.output_dir``, and for
    ``dream report`` what :class:`~dream_training.run_record.RunRecord` names. Ctrl-C stops after
    the current step and keeps what there is.

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
    check_tasks(config.final_tasks or [])
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "config.json", asdict(config))
    if model is None:
        model = make_retriever(config)
    loss, collator, columns = _objective(config, model, data, heads, output_dir, console)
    history = history or History()
    record = RunRecord(config, model, data, loss, evaluator, history)
    progress = ProgressCallback(loss, history, console, config.log_steps)
    keeper = KeepBestCallback(model, history, output_dir, console)
    trainer = _trainer(config, model, columns, loss, collator, evaluator, evaluate_first)
    for callback in (progress, keeper, record):
        trainer.add_callback(callback)
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
    write_json(
        output_dir / "history.json",
        {"steps": history.steps, "evaluations": history.evaluations},
    )
    plot_curve(history, output_dir / "curve.png")
    if interrupted:
        console.print(f"Interrupted after {len(history.steps)} steps; the retriever is in {path}")
    record.finish(path, console, interrupted)
    return TrainResult(model, path, history, interrupted, seconds)


def _objective(
    config: TrainConfig,
    model: SentenceTransformer,
    data: Dataset,
    heads: HeadFile | None,
    output_dir: Path,
    console: Console,
) -> tuple[Any, DreamCollator | None, Dataset]:
    """Return the loss, its collator, and the data in the columns that the loss expects."""
    if config.objective == "infonce":
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        return (
            MultipleNegativesRankingLoss(model, scale=1.0 / config.temperature),
            None,
            _pairs(data),
        )
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
    reader = load_reader(config, heads.by_layer(config.top_k))
    collator = DreamCollator(model, config.query_max_len, config.passage_max_len)
    return DreamLoss(model, reader, config.temperature), collator, data


def _pairs(data: Dataset) -> Dataset:
    """(query, relevant document) columns for objectives that need labels."""
    rows = [
        {"query": row["query"], "positive": row["documents"][row["positive"]]}
        for row in data
        if row["positive"] >= 0
    ]
    if not rows:
        raise ValueError("objective 'infonce' needs known positives, and no training line has one")
    return type(data).from_list(rows)


def _trainer(
    config: TrainConfig,
    model: SentenceTransformer,
    data: Dataset,
    loss: Any,
    collator: DreamCollator | None,
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
        prompts={"query": config.query_prompt, "positive": config.document_prompt},
        **evaluate,
    )
    # A card without widget examples would have the trainer make some from the training columns.
    model.model_card_data.widget = [{}]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=data,
        loss=loss,
        evaluator=evaluator,
        data_collator=collator,  # type: ignore[arg-type]  # duck-typed by the trainer
    )
    trainer.remove_callback(PrinterCallback)
    model.model_card_data.widget = []
    return trainer
