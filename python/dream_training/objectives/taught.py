"""DREAM from verdicts that the reader gave before: no reader is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_training.objectives.base import PoolObjective
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distillation import TeacherLoss

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.objectives.temperature import Temperature


class TaughtDreamLoss(PoolObjective):
    r"""The loss of ``DistilledDreamLoss`` from verdicts that ``dream teach`` has written.

    The verdicts do not depend on the retriever: they are those that the live loss would compute
    for the same pools. Use it with :class:`TaughtCollator`::

        loss = TaughtDreamLoss(model)
        SentenceTransformerTrainer(
            model, args, train_dataset=data, loss=loss, data_collator=TaughtCollator(model)
        ).train()

    Args:
        model: the retriever.
        temperature: divides the cosine similarities, a number or a ``Temperature``.
        teacher_temperature: divides the teacher's logits, in nats.
        direction: ``"teacher_student"`` or ``"student_teacher"``, of the divergence.
        teacher_loss: ``"kl"`` or ``"margin"``, see
            :class:`~dream_training.objectives.distillation.TeacherLoss`.
        mini_batch_size: texts that the retriever embeds at once; None for the whole batch.

    Raises:
        ValueError: an argument is out of range; in training, a batch has no logits.
    """

    name = "dream"

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float | Temperature = 0.05,
        *,
        teacher_temperature: float = 3.0,
        direction: str = "teacher_student",
        teacher_loss: str = "kl",
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, temperature, mini_batch_size)
        self.teacher_loss = TeacherLoss(teacher_loss, teacher_temperature, direction)

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        """The teacher's logits, ``[B, C]``, 0 after the end of a smaller pool."""
        if "logits" not in query:
            raise ValueError(
                "TaughtDreamLoss needs the teacher's logits: give the trainer "
                "data_collator=TaughtCollator(model) and the rows of a folder of dream teach"
            )
        rows = [torch.tensor(row, dtype=torch.float32) for row in query["logits"]]
        logits = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return logits.to(pool["input_ids"].device)

    def loss(
        self, scores: Tensor, evidence: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        return self.teacher_loss(evidence.to(scores), scores)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {**super().get_config_dict(), "teaching": "taught", **self.teacher_loss.describe()}


class TaughtCollator(DreamCollator):
    """Data collator for :class:`TaughtDreamLoss`: every query has the pool that it was taught with.

    A row has the columns of :class:`~dream_training.objectives.collator.DreamCollator` and
    ``logits``, one for each of its ``documents``. A document of several rows is embedded once.

    Args:
        model: the retriever; its tokenizer, lengths and prompts are used.
        agreeing: leave out the rows whose known relevant document is not the one that the teacher
            prefers, as far as a batch has others. The others keep their pools.
    """

    def __init__(self, model: SentenceTransformer, agreeing: bool = False) -> None:
        super().__init__(model, pool="mined")
        self.agreeing = agreeing

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.agreeing:
            rows = [row for row in rows if _agrees(row)] or rows
        batch = super().__call__(rows)
        if rows:
            batch["query_logits"] = [list(row["logits"]) for row in rows]
        return batch


def _agrees(row: dict[str, Any]) -> bool:
    """Whether the teacher prefers the known relevant document, if one is known."""
    return row["positive"] < 0 or row["logits"][row["positive"]] == max(row["logits"])
