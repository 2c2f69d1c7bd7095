"""A retriever's ranking of the demo's queries, and the scores of the test queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dream_training.evaluation import (
    Ranking,
    RetrievalEvaluator,
    RetrievalTask,
    average,
    bootstrap_interval,
    score_queries,
)


@dataclass(frozen=True)
class Measured:
    """What one retriever finds.

    Attributes:
        ranking: of the queries of all splits.
        scores: ``ndcg_at_10`` and ``recall_at_10`` of each test query.
    """

    ranking: Ranking
    scores: dict[str, dict[str, float]]

    @classmethod
    def of(cls, test: RetrievalTask, ranking: Ranking) -> Measured:
        return cls(ranking, score_queries(test, ranking))

    @property
    def means(self) -> dict[str, float]:
        return average(self.scores)

    @property
    def ndcg(self) -> dict[str, float]:
        """nDCG@10 by test query."""
        return {query: scores["ndcg_at_10"] for query, scores in self.scores.items()}

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean nDCG@10 over queries of this kind."""
        return bootstrap_interval(list(self.ndcg.values()))

    def ranked(self, query: str) -> list[str]:
        """The ids of the documents found, best first."""
        found = self.ranking.get(query, {})
        return sorted(found, key=lambda document: -found[document])


class DemoEvaluator(RetrievalEvaluator):
    """Ranks the documents for all queries in one pass; the score is that of the test queries.

    Attributes:
        measured: of the last call.
    """

    measured: Measured

    def __init__(self, task: RetrievalTask, test: RetrievalTask) -> None:
        super().__init__(task)
        self.test = test

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.measured = Measured.of(self.test, self.rank(model))
        self.query_scores = self.measured.scores
        return self.measured.means
