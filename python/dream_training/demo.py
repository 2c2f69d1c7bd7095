"""``dream demo``: from an untrained model to a retriever, on data that every installation has."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dream_kernels.files import is_stream
from dream_training.config import TrainConfig
from dream_training.data.beir_folder import write_beir_folder
from dream_training.data.docstrings import (
    DEFAULT_PACKAGES,
    DocumentationData,
    RetrievalSplit,
    load_documentation,
)
from dream_training.data.jsonl import to_training_data
from dream_training.evaluation import (
    Ranking,
    RetrievalEvaluator,
    RetrievalTask,
    average,
    score_queries,
    score_ranking,
    search_bm25,
)
from dream_training.json_file import read_json, write_json
from dream_training.models.loading import make_retriever, resolve_model
from dream_training.plots import plot_curve
from dream_training.training.callbacks import History
from dream_training.training.driver import train
from dream_training.training.output_folder import CONFIG, results_in

RETRIEVER_LAYERS = 10
HEADS = 64
SHOWN_QUERIES = 4
_DATA = "documentation of the installed packages"
_PACKAGES = ("torch", "transformers", "sentence-transformers", "peft")


def run_demo(
    output_dir: Path,
    *,
    reader: str = "smollm2",
    steps: int = 80,
    seed: int = 0,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    test_size: int = 500,
) -> dict[str, Any]:
    """Train on documentation, and show how much better the retriever became.

    Writes to ``output_dir``: ``metrics.json``, ``curve.png``, ``heads.yaml``, ``heads.png``, the
    retriever, and ``beir/``, the data as a BEIR folder.

    Args:
        output_dir: where everything goes.
        reader: folder or hub name of the frozen language model; ``smollm2`` is the packaged one.
            The retriever is made of the first layers of the same model.
        steps: training steps.
        seed: of weights, data order and head selection.
        packages: the packages whose documentation is the data.
        test_size: number of test queries.

    Returns:
        What ``metrics.json`` holds.
    """
    begin = time.perf_counter()
    console = Console()
    _check_folder(output_dir)
    layers, heads = _sizes(reader)
    config = TrainConfig(
        reader=reader,
        retriever=reader,
        retriever_layers=layers,
        train_data=_DATA,
        # Chosen for 15 minutes on two cores: the beginnings of many documents teach more there than
        # the whole of a few.
        top_k=heads,
        temperature=0.02,
        batch_size=28,
        query_max_len=24,
        passage_max_len=40,
        target_max_len=16,
        learning_rate=2e-3,
        warmup_steps=5,
        max_steps=steps,
        eval_steps=-(-steps // 3),  # rounded up, so that the last step is the third evaluation
        seed=seed,
        output_dir=str(output_dir),
    )
    console.rule("data")
    data = load_documentation(packages, seed=seed, test_size=test_size)
    _print_data(console, data)
    write_beir_folder(
        output_dir / "beir",
        data.corpus,
        {"test": data.test, "repeats": data.repeats},
        train=data.train,
    )
    test, repeats = _task(data, data.test), _task(data, data.repeats)
    both = RetrievalTask(
        {**test.queries, **repeats.queries}, data.corpus, {**test.qrels, **repeats.qrels}
    )

    console.rule("before")
    model = make_retriever(config)
    evaluator = _DemoEvaluator(both, test)
    untrained = evaluator(model)
    before = evaluator.ranking
    bm25 = search_bm25(both)
    console.print(
        f"untrained: nDCG@10 {untrained['ndcg_at_10']:.3f} on {len(test.queries)} queries"
    )

    console.rule("training, without relevance labels")
    rows = to_training_data((e.query, e.target, e.document) for e in data.train)
    result = train(
        config,
        data=rows,
        evaluator=evaluator,
        model=model,
        console=console,
        evaluate_first=False,
        overwrite=True,
        history=History(evaluations=[{"step": 0.0, **untrained}]),
    )
    if result.interrupted:
        raise KeyboardInterrupt

    console.rule("after")
    if result.history.evaluations[-1]["step"] != steps:
        result.history.evaluations.append({"step": float(steps), **evaluator(result.model)})
    after = evaluator.ranking
    metrics: dict[str, Any] = {
        "before": untrained,
        "after": score_ranking(test, after),
        "bm25": score_ranking(test, bm25),
        "repeats": {
            name: score_ranking(repeats, ranking)
            for name, ranking in (("before", before), ("after", after), ("bm25", bm25))
            if repeats.queries
        },
        "queries": len(test.queries),
        "repeat_queries": len(repeats.queries),
        "documents": len(test.corpus),
        "steps": len(result.history.steps),
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "training_seconds": round(result.seconds, 1),
        "versions": _versions(data),
    }
    write_json(output_dir / "metrics.json", metrics)
    plot_curve(
        result.history,
        output_dir / "curve.png",
        {"BM25": metrics["bm25"]["ndcg_at_10"]},
        "A frozen language model teaches a retriever",
    )
    _print_table(console, metrics)
    _print_examples(console, test, before, after)
    _print_files(console, output_dir, metrics)
    return metrics


class _DemoEvaluator(RetrievalEvaluator):
    """Ranks the documents for all queries in one pass; the score is that of the test queries."""

    def __init__(self, task: RetrievalTask, test: RetrievalTask) -> None:
        super().__init__(task)
        self.test = test
        self.ranking: Ranking = {}

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.ranking = self.rank(model)
        self.query_scores = score_queries(self.test, self.ranking)
        return average(self.query_scores)


def _check_folder(output_dir: Path) -> None:
    """Raise unless the demo may replace what is there: an earlier demo.

    Raises:
        FileExistsError: there is another run.
        ValueError: it is standard output, a device or a pipe.
    """
    if is_stream(output_dir):
        raise ValueError(f"--output-dir must be a folder, got {output_dir}")
    config = output_dir / CONFIG
    if results_in(output_dir) and config.is_file() and read_json(config).get("train_data") != _DATA:
        raise FileExistsError(
            f"{output_dir} has results of another run than the demo's: choose another --output-dir"
        )


def _sizes(reader: str) -> tuple[int, int]:
    """Layers of the retriever and heads of the reader, no more than the model has."""
    from dream_training.models.trust import load_model_config

    model = load_model_config(resolve_model(reader), what="reader")
    heads = model.num_hidden_layers * model.num_attention_heads
    return min(RETRIEVER_LAYERS, model.num_hidden_layers), min(HEADS, heads)


def _task(data: DocumentationData, split: RetrievalSplit) -> RetrievalTask:
    return RetrievalTask(split.queries, data.corpus, split.qrels)


def _print_data(console: Console, data: DocumentationData) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    console.print(
        f"The documentation of {packages}.\n"
        f"{len(data.train)} training examples: a summary line asks, the reader predicts how the "
        "description of the same function begins.\n"
        f"{len(data.test.queries)} test queries over {len(data.corpus)} documents: See Also lines "
        "that someone wrote about a function in the docstring of another one. None of these "
        f"functions is trained on. {len(data.repeats.queries)} more lines only repeat the "
        "function's own summary and are reported apart.",
        highlight=False,
    )


def _print_table(console: Console, metrics: dict[str, Any]) -> None:
    table = Table(
        title=f"{metrics['queries']} queries, {metrics['documents']} documents", title_style=""
    )
    table.add_column("retriever")
    table.add_column("nDCG@10", justify="right")
    table.add_column("recall@10", justify="right")
    names = {"before": "untrained", "after": "DREAM", "bm25": "BM25"}
    for key, name in names.items():
        scores = metrics[key]
        table.add_row(name, f"{scores['ndcg_at_10']:.3f}", f"{scores['recall_at_10']:.3f}")
    console.print(table)
    repeats = metrics["repeats"]
    if not repeats:
        return
    console.print(
        f"Queries that repeat the summary: DREAM {repeats['after']['ndcg_at_10']:.3f}, "
        f"BM25 {repeats['bm25']['ndcg_at_10']:.3f}."
    )


def _print_examples(console: Console, task: RetrievalTask, before: Ranking, after: Ranking) -> None:
    """Show evenly spread test queries, not chosen by their outcome."""
    console.rule("some queries, the relevant document marked with *")
    queries = sorted(task.queries)
    for query in queries[:: max(1, len(queries) // SHOWN_QUERIES)][:SHOWN_QUERIES]:
        console.print(f"\n{task.queries[query]}", style="bold", highlight=False, markup=False)
        for name, ranking in (("before", before), ("after", after)):
            top = sorted(ranking[query].items(), key=lambda item: -item[1])[:3]
            marked = [f"{d}{'*' if d in task.qrels[query] else ''}" for d, _ in top]
            console.print(f"  {name:>6}: {', '.join(marked)}", highlight=False, markup=False)


def _print_files(console: Console, output_dir: Path, metrics: dict[str, Any]) -> None:
    console.rule("what there is now")
    console.print(
        # The last model, not the best: that one was chosen on the test queries.
        f'retriever  SentenceTransformer("{output_dir / "last"}")\n'
        f"curve      {output_dir / 'curve.png'}\n"
        f"heads      {output_dir / 'heads.png'}\n"
        f"metrics    {output_dir / 'metrics.json'}\n"
        f"data       {output_dir / 'beir'}\n"
        f"{metrics['seconds']:.0f} s in all, {metrics['training_seconds']:.0f} s of them training",
        highlight=False,
        soft_wrap=True,  # a path broken over two lines cannot be copied
    )


def _versions(data: DocumentationData) -> dict[str, str]:
    versions = {"python": platform.python_version(), **data.versions}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions
