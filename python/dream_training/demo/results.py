"""The results of the demo: metrics, plot and examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dream_training.demo.measured import Measured
from dream_training.demo.parts import Part, Setup
from dream_training.evaluation import Comparison, compare_queries, score_ranking, search_bm25
from dream_training.plots import plot_curves

# The subfolder of part 2.
ADAPTED = "adapted"


@dataclass(frozen=True)
class Results:
    """Both parts, or one.

    Attributes:
        setup: what they share.
        trained: name of the retriever of part 2.
        first: part 1.
        second: part 2.
    """

    setup: Setup
    trained: str
    first: Part | None
    second: Part | None

    @cached_property
    def bm25(self) -> Measured:
        return Measured.of(self.setup.test, search_bm25(self.setup.both))

    @cached_property
    def comparison(self) -> Comparison | None:
        """The adapted retriever against what it was before."""
        if self.second is None:
            return None
        return compare_queries(self.second.before.ndcg, self.second.after.ndcg)

    @property
    def rows(self) -> dict[str, Measured]:
        """Every retriever by its name, as the table shows them."""
        rows: dict[str, Measured] = {}
        if self.first is not None:
            rows |= {"untrained": self.first.before, "DREAM from nothing": self.first.after}
        if self.second is not None:
            rows |= {
                self.trained: self.second.before,
                f"{self.trained} + DREAM": self.second.after,
            }
        return {**rows, "BM25": self.bm25}

    def examples(self) -> tuple[dict[str, Measured], list[str], str]:
        """The retrievers to show on single queries, the queries, and a title for them."""
        if self.second is None:
            queries = sorted(self.setup.test.queries)
            return {k: v for k, v in self.rows.items() if k != "BM25"}, queries, "some queries"
        before, after = self.second.before, self.second.after
        # Both rank most queries alike: those that changed tell more.
        changed = [q for q in sorted(before.ndcg) if before.ndcg[q] != after.ndcg[q]]
        rows = {self.trained: before, f"{self.trained} + DREAM": after}
        return rows, changed, f"some of the {len(changed)} queries with a different result"

    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` has about the retrievers."""
        setup = self.setup
        named = {"bm25": self.bm25}
        if self.first is not None:
            named = {"before": self.first.before, "after": self.first.after, **named}
        metrics: dict[str, Any] = {name: measured.means for name, measured in named.items()}
        metrics["intervals"] = {name: measured.interval for name, measured in named.items()}
        metrics["repeats"] = {
            name: score_ranking(setup.repeats, measured.ranking)
            for name, measured in named.items()
            if setup.repeats.queries
        }
        metrics |= {
            "queries": len(setup.test.queries),
            "repeat_queries": len(setup.repeats.queries),
            "documents": len(setup.test.corpus),
        }
        if self.first is not None:
            metrics["steps"] = len(self.first.history.steps)
            metrics["training_seconds"] = round(self.first.seconds, 1)
        if self.second is not None:
            metrics["adapted"] = self._adapted(self.second)
        return metrics

    def _adapted(self, part: Part) -> dict[str, Any]:
        compared = asdict(self.comparison) if self.comparison is not None else {}
        found = {"retriever": self.trained, "before": part.before.means, "after": part.after.means}
        names = ("difference", "low", "high", "p_value", "wins", "ties", "losses")
        return {
            **found,
            **{name: compared[name] for name in names},
            "intervals": {"before": part.before.interval, "after": part.after.interval},
            "steps": len(part.history.steps),
            "training_seconds": round(part.seconds, 1),
        }

    def draw(self, path: Path) -> None:
        """Draw the curves of all parts."""
        histories = {}
        if self.first is not None:
            histories["a retriever from nothing"] = self.first.history
        if self.second is not None:
            histories[f"{self.trained}, adapted"] = self.second.history
        plot_curves(histories, path, {"BM25": self.bm25.means["ndcg_at_10"]})

    def files(self, output_dir: Path) -> Mapping[str, str]:
        """What the demo writes, by name."""
        found = {}
        if self.first is not None:
            found["from nothing"] = f'SentenceTransformer("{self.first.path}")'
        if self.second is not None:
            found["adapted"] = f'SentenceTransformer("{self.second.path}")'
        heads = output_dir if self.first is not None else output_dir / ADAPTED
        return {
            **found,
            "curve": str(output_dir / "curve.png"),
            "heads": str(heads / "heads.png"),
            "metrics": str(output_dir / "metrics.json"),
            "data": str(output_dir / "beir"),
        }
