"""The two training runs of the demo, on the same batches and with the same reader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_kernels import HeadFile
from dream_training.config import TrainConfig
from dream_training.data.jsonl import to_training_data
from dream_training.data.neighbours import group_rows
from dream_training.demo.docstrings import DocumentationData, RetrievalSplit
from dream_training.demo.measured import DemoEvaluator, Measured
from dream_training.demo.pools import stream_batches
from dream_training.evaluation import RetrievalTask
from dream_training.history import History
from dream_training.json_file import write_json
from dream_training.models.loading import make_retriever, resolve_model
from dream_training.models.retriever import merged
from dream_training.objectives.verdicts import Verdicts
from dream_training.plots import plot_curve
from dream_training.training.driver import train
from dream_training.training.output_folder import LAST

if TYPE_CHECKING:
    from datasets import Dataset

DATA = "documentation of the installed packages"
RETRIEVER_LAYERS = 10
HEADS = 64
# Groups of neighbours in a batch, and queries in a group.
GROUPS, GROUP = 4, 7
# Passes over the batches that are read once, and the share of its update that part 2 keeps.
ROUNDS, SHARE = 2, 0.5


@dataclass(frozen=True)
class Setup:
    """What both parts share.

    Attributes:
        test: the queries that count.
        repeats: those that only repeat a summary.
        both: all of them, ranked in one pass.
        rows: training data.
        batches: the indices of the rows of each batch.
        settings: of the config: the reader, how it reads, the seed.
        steps: of each part.
        console: where to print.
        verdicts: what the reader said, kept for the second part.
    """

    test: RetrievalTask
    repeats: RetrievalTask
    both: RetrievalTask
    rows: Dataset
    batches: list[list[int]]
    settings: dict[str, Any]
    steps: int
    console: Console
    verdicts: Verdicts = field(default_factory=Verdicts)

    @classmethod
    def of(
        cls, data: DocumentationData, reader: str, steps: int, seed: int, console: Console
    ) -> Setup:
        """Prepare data, batches and settings."""
        test, repeats = _task(data, data.test), _task(data, data.repeats)
        both = RetrievalTask(
            {**test.queries, **repeats.queries}, data.corpus, {**test.qrels, **repeats.qrels}
        )
        texts = [f"{example.query}\n{example.document}" for example in data.train]
        batches = group_rows(texts, GROUP, GROUPS, seed)[: -(-steps // ROUNDS)]
        settings: dict[str, Any] = {
            "reader": reader,
            "train_data": DATA,
            # The beginnings of many documents teach more in this time than the whole of a few.
            "batch_size": GROUP * GROUPS,
            "query_max_len": 24,
            "reader_passage_max_len": 40,
            "target_max_len": 16,
            "top_k": _heads_of(reader),
            "save_steps": 0,
            "seed": seed,
        }
        rows = to_training_data((e.query, e.target, e.document) for e in data.train)
        return cls(test, repeats, both, rows, batches, settings, steps, console)


@dataclass(frozen=True)
class Part:
    """What one training run did.

    Attributes:
        before: the retriever before its first step.
        after: the same after the last.
        history: losses and evaluations.
        path: folder of the retriever after the last step.
        seconds: of the training, evaluations included.
    """

    before: Measured
    after: Measured
    history: History
    path: Path
    seconds: float


def train_from_nothing(setup: Setup, output_dir: Path) -> Part:
    """Train the first layers of the reader's own backbone, which are not a retriever yet."""
    reader = str(setup.settings["reader"])
    config = TrainConfig(
        **setup.settings,
        retriever=reader,
        retriever_layers=_layers_of(reader),
        passage_max_len=40,
        temperature=0.02,
        learning_rate=2e-3,
        warmup_steps=5,
        max_steps=setup.steps,
        eval_steps=-(-setup.steps // 2),
        output_dir=str(output_dir),
    )
    return _train(setup, config)


def adapt_trained(
    setup: Setup, output_dir: Path, retriever: str, heads: HeadFile | None = None
) -> Part:
    """Adapt a trained retriever to documents without labels.

    Its weights are averaged with those it began with, and every figure is that of the average.

    Args:
        setup: what both parts share.
        output_dir: of this part.
        retriever: folder or hub name of a sentence-transformers model.
        heads: of the reader; selected here by default.
    """
    config = TrainConfig(
        **setup.settings,
        retriever=retriever,
        lora_r=0,
        passage_max_len=64,
        temperature=0.05,
        learning_rate=1e-4,
        warmup_steps=5,
        max_steps=setup.steps,
        trained_share=SHARE,
        eval_steps=-(-setup.steps // 2),
        report_queries=0,
        output_dir=str(output_dir),
    )
    return _train(setup, config, heads)


def _train(setup: Setup, config: TrainConfig, heads: HeadFile | None = None) -> Part:
    """Train, and measure at the start, halfway and at the end.

    Args:
        setup: what both parts share.
        config: of this one.
        heads: of the reader; selected here by default.
    """
    steps, folder = config.optimisation.max_steps, Path(config.output.output_dir)
    model = make_retriever(config.retriever, config.lengths, config.run)
    evaluator = DemoEvaluator(setup.both, setup.test)
    history = History()

    def measure(step: int) -> None:
        means = evaluator(merged(model))
        history.evaluations.append({"step": float(step), **means})
        setup.console.print(
            f"step {step}  nDCG@10 {means['ndcg_at_10']:.4f}  recall@10 {means['recall_at_10']:.4f}"
        )

    measure(0)
    before = evaluator.measured
    result = train(
        config,
        data=stream_batches(setup.rows, setup.batches, steps, config.run.seed),
        heads=heads,
        model=model,
        console=setup.console,
        overwrite=True,
        history=history,
        verdicts=setup.verdicts,
        evaluator=evaluator,
        evaluate_first=False,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    if history.evaluations[-1]["step"] != steps:
        measure(steps)
        write_json(folder / "history.json", history.state())
        plot_curve(history, folder / "curve.png")
    # The last model, not the best: that one was chosen on the test queries.
    return Part(before, evaluator.measured, history, folder / LAST, result.seconds)


def _task(data: DocumentationData, split: RetrievalSplit) -> RetrievalTask:
    return RetrievalTask(split.queries, data.corpus, split.qrels)


def _heads_of(reader: str) -> int:
    """How many of the reader's heads are scored, no more than it has."""
    model = _config_of(reader)
    return min(HEADS, model.num_hidden_layers * model.num_attention_heads)


def _layers_of(reader: str) -> int:
    return min(RETRIEVER_LAYERS, _config_of(reader).num_hidden_layers)


def _config_of(reader: str) -> Any:
    from dream_training.trust import load_model_config

    return load_model_config(resolve_model(reader, what="reader"), what="reader")
