"""What the demo prints, at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from dream_training.console import make_table, print_paths
from dream_training.demo.docstrings import DocumentationData
from dream_training.demo.measured import Measured
from dream_training.demo.results import Results
from dream_training.environment import installed_versions
from dream_training.evaluation import Comparison, RetrievalTask

SHOWN_QUERIES = 4
# Of a document's name, so that a line of the examples has at most 80 columns.
_NAME_COLUMNS = 46


def print_data(console: Console, data: DocumentationData) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    console.print(
        f"The documentation of {packages}.\n"
        f"{len(data.train)} training examples: a summary line asks, the reader predicts how the "
        "description of the same function begins.\n"
        f"{len(data.test.queries)} test queries over {len(data.corpus)} documents: See Also lines "
        "that someone wrote about a function in the docstring of another one. None of these "
        f"functions is trained on. {len(data.repeats.queries)} more lines only repeat the "
        "function's own summary and are reported separately."
    )


def print_results(console: Console, results: Results, metrics: Mapping[str, Any]) -> None:
    """Print a line for every retriever, what the adaptation changed, and some queries."""
    console.rule("results")
    console.print(f"{metrics['queries']} test queries, {metrics['documents']} documents\n")
    table = make_table("retriever", "nDCG@10", "95 % interval", "recall@10")
    for name, measured in results.rows.items():
        means = measured.means
        low, high = measured.interval
        table.add_row(
            name,
            f"{means['ndcg_at_10']:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{means['recall_at_10']:.3f}",
        )
    console.print(table)
    console.print()
    if results.comparison is not None:
        print_comparison(console, results.trained, results.comparison)
    repeats = metrics["repeats"]
    if "after" in repeats:
        console.print(
            "Queries that repeat the summary: DREAM from nothing "
            f"{repeats['after']['ndcg_at_10']:.3f}, BM25 {repeats['bm25']['ndcg_at_10']:.3f}."
        )
    rows, queries, title = results.examples()
    if queries:
        console.rule(f"{title}, * for a relevant document")
        print_examples(console, results.setup.test, rows, queries)


def print_comparison(console: Console, name: str, comparison: Comparison) -> None:
    """Print what changed from the trained retriever to the adapted one."""
    console.print(
        f"{name} + DREAM against {name}: {comparison.difference:+.3f} nDCG@10, 95 % interval "
        f"{comparison.low:+.3f} .. {comparison.high:+.3f},\n"
        f"p = {comparison.p_value:.4f}; better on {comparison.wins} queries, worse on "
        f"{comparison.losses}, as good on {comparison.ties}."
    )


def print_examples(
    console: Console, task: RetrievalTask, rows: Mapping[str, Measured], queries: Sequence[str]
) -> None:
    """Print some queries, the rank of the relevant document, and what is found first.

    The queries are evenly spread, not chosen by their results.
    """
    width = max(map(len, rows))
    for query in queries[:: max(1, len(queries) // SHOWN_QUERIES)][:SHOWN_QUERIES]:
        console.print(f"\n{task.queries[query]}", style="bold")
        for name, measured in rows.items():
            ranked = measured.ranked(query)
            places = [i for i, d in enumerate(ranked, 1) if d in task.qrels[query]]
            place = f"rank {places[0]}" if places else "not in 10"
            first = ranked[0] if ranked else ""
            if len(first) > _NAME_COLUMNS:
                first = f"...{first[-_NAME_COLUMNS + 3 :]}"
            mark = "*" if places[:1] == [1] else " "
            console.print(f"  {name:<{width}}  {place:<9}  {mark} {first}", soft_wrap=True)


def print_files(
    console: Console, files: Mapping[str, str], metrics: Mapping[str, Any], missing: str | None
) -> None:
    """Print what was written, and how long it took."""
    console.rule("output")
    print_paths(console, files)
    parts = [metrics, metrics.get("adapted", {})]
    training = sum(part.get("training_seconds", 0.0) for part in parts)
    console.print(f"{metrics['seconds']:.0f} s in total, {training:.0f} s of it training")
    if missing is not None:
        print_left_out(console, missing)


def print_left_out(console: Console, missing: str) -> None:
    # The command is copied.
    console.print(f"Part 2 is left out: {missing}", soft_wrap=True)


def describe_versions(data: DocumentationData, packages: Sequence[str]) -> dict[str, Any]:
    """Versions of what the figures depend on, by package."""
    import platform

    versions = {"python": platform.python_version(), **data.versions}
    return versions | installed_versions(packages)
