"""The trainer of sentence-transformers, evaluating in all processes."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from transformers.trainer_utils import EvalLoopOutput


class Trainer(SentenceTransformerTrainer):
    """Runs the evaluator in every process, each of which does its share.

    The library runs it in process 0 and has the others encode what that sends them, at the length
    that their own copy of the model has, and not at that of queries or documents. With FSDP and
    ZeRO it lets every process encode everything.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        evaluator, self.evaluator = self.evaluator, None
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.evaluator = evaluator
        if evaluator is not None:
            metrics: Any = evaluator(self.model, steps=self.state.global_step)
            output.metrics.update({f"eval_{name}": value for name, value in metrics.items()})  # type: ignore[union-attr]
        return output
