"""What a run writes for ``dream report`` and ``dream compare-runs`` besides models and history."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dream_training.config_groups import EvaluationConfig, OutputConfig, RunConfig
from dream_training.distributed import world
from dream_training.distributed.sharding import loaded_whole, whole
from dream_training.environment import describe_environment
from dream_training.evaluation import Evaluation, RetrievalEvaluator, expand_tasks
from dream_training.evaluation.options import EvaluationOptions
from dream_training.evaluation.results import (
    FILE_NAME,
    UNTRAINED,
    is_same_task,
    retrieval_settings,
    write_evaluations,
)
from dream_training.evaluation.tasks import evaluate_task
from dream_training.history import History
from dream_training.json_file import write_json
from dream_training.objectives.temperature import Temperature
from dream_training.training.examples import TrainingExamples
from dream_training.training.output_folder import ENVIRONMENT, EXAMPLES

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.objectives.base import TrainingObjective


class RunRecord(TrainerCallback):
    """Measures a run before, during and after training, and writes the results.

    It writes ``environment.json`` at once; ``examples.json`` (see :class:`TrainingExamples`) and
    ``evaluation.json`` by :meth:`finish`. The latter holds the scores of every query, of the
    untrained and of the best model as the evaluations during training found them, and of the best
    model on ``final_tasks``. With several processes all of them measure, and process 0 writes and
    evaluates on ``final_tasks``.

    Args:
        output: of the run.
        wanted: its evaluations.
        run: the seed of the examples, and whether a model's code is trusted.
        model: the retriever, untrained.
        data: training data.
        loss: the objective.
        evaluator: what evaluates during training.
        history: of the run; if it has an evaluation already, the evaluator's scores belong to it.
        resumed: the run resumes from a checkpoint, so nothing is measured before its first step.
    """

    def __init__(
        self,
        output: OutputConfig,
        wanted: EvaluationConfig,
        run: RunConfig,
        model: SentenceTransformer,
        data: Iterable[Any],
        loss: TrainingObjective,
        evaluator: RetrievalEvaluator | None,
        history: History,
        resumed: bool = False,
    ) -> None:
        self.wanted, self.run = wanted, run
        self.model, self.loss = model, loss
        self.evaluator, self.history = evaluator, history
        self.output_dir = Path(output.output_dir)
        self._scores: dict[int, dict[str, dict[str, float]]] = {}
        self._taken: Any = None
        if history.evaluations:
            self._take(0)
        if world.is_main():
            write_json(self.output_dir / ENVIRONMENT, describe_environment(model.device))
        self.examples: TrainingExamples | None = None
        if output.report_queries:
            self.examples = TrainingExamples(data, output.report_queries, run.seed)
            if not resumed:
                self._measure("before")

    def state(self) -> dict[str, Any]:
        return {
            "scores": {str(step): scores for step, scores in self._scores.items()},
            "examples": None if self.examples is None else self.examples.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._scores = {int(step): scores for step, scores in state["scores"].items()}
        if self.examples is not None and state["examples"] is not None:
            self.examples.restore(state["examples"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._take(state.global_step)

    def finish(self, path: Path, console: Console, interrupted: bool) -> None:
        """Write examples and evaluations.

        Args:
            path: the model that the run ends with.
            console: where to print.
            interrupted: skip the final tasks.

        Raises:
            FileNotFoundError: data of a final task could not be fetched.
        """
        if self.examples is not None:
            self._measure("after")
        if not world.is_main():
            return
        if self.examples is not None:
            write_json(self.output_dir / EXAMPLES, self.examples.content())
        found, wanted = self._evaluations(path), self.wanted
        environment = describe_environment(self.model.device)
        if found:
            write_evaluations(self.output_dir / FILE_NAME, found, environment)
        if interrupted or not wanted.final_tasks:
            return
        from dream_training.models.retriever import load_sentence_transformer

        with loaded_whole():
            best = load_sentence_transformer(
                path,
                device=str(self.model.device),
                trust_remote_code=self.run.trust_remote_code,
            )
        options = EvaluationOptions(
            split=wanted.eval_split,
            keep_identical_ids=wanted.keep_identical_ids,
        )
        for task in expand_tasks(wanted.final_tasks):
            evaluation = evaluate_task(best, str(path), task, options)
            console.print(
                f"{task}: nDCG@10 {evaluation.ndcg_at_10:.4f}  "
                f"recall@10 {evaluation.recall_at_10:.4f}"
            )
            # On all queries, it replaces the score on a part of them during training.
            found = [e for e in found if e.model != str(path) or not is_same_task(e, evaluation)]
            found.append(evaluation)
            write_evaluations(self.output_dir / FILE_NAME, found, environment)

    def _take(self, step: int) -> None:
        """Keep the scores of every query if the evaluator has new ones."""
        scores = getattr(self.evaluator, "query_scores", None)
        if scores and scores is not self._taken:
            self._scores[step] = self._taken = scores
            # No others will be written.
            needed = {0, self.history.best_step, step}
            self._scores = {s: kept for s, kept in self._scores.items() if s in needed}

    def _evaluations(self, path: Path) -> list[Evaluation]:
        if self.evaluator is None:
            return []
        found, wanted = [], self.wanted
        settings = retrieval_settings(
            self.model,
            self.evaluator.task,
            split=wanted.eval_split,
            path=wanted.eval_data,
        )
        for step, name in ((0, UNTRAINED), (self.history.best_step, str(path))):
            if step in self._scores:
                task = wanted.eval_data or "evaluation during training"
                found.append(
                    Evaluation.from_scores(
                        name,
                        task,
                        self.evaluator.task,
                        self._scores[step],
                        {**settings, "step": step},
                    )
                )
        return found

    def _measure(self, name: str) -> None:
        assert self.examples is not None
        reader = self.loss.reader
        if reader is not None and not reader.injection.heads:
            reader = None  # no head of it receives the scores
        temperature = self.loss.temperature
        value = temperature.value if isinstance(temperature, Temperature) else temperature
        self.examples.measure(name, whole(self.model), reader, value)
