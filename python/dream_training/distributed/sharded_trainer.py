"""The trainer of sentence-transformers in several processes."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from transformers.trainer_utils import EvalLoopOutput

from dream_training.distributed.sharding import shard_retriever


class Trainer(SentenceTransformerTrainer):
    """Shards the retriever by its layers, and runs the evaluator in every process.

    Accelerate does not know the layers of a sentence-transformers model, and takes ``Normalize``
    for the final norm of a language model, which it cannot shard; it leaves alone what is sharded.

    The library runs the evaluator in process 0 and has the others encode what it sends them, at the
    length that their own copy of the model has, not at that of queries or documents. With FSDP and
    ZeRO every process encodes everything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            shard_retriever(self.model, self.accelerator.state.fsdp_plugin)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        evaluator, self.evaluator = self.evaluator, None
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.evaluator = evaluator
        if evaluator is not None:
            metrics: Any = evaluator(self.evaluated(), steps=self.state.global_step)
            output.metrics.update({f"eval_{name}": value for name, value in metrics.items()})  # type: ignore[union-attr]
        return output

    def evaluated(self) -> Any:
        """The model for the evaluator; every process calls it."""
        return self.model
