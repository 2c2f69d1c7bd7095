"""Objectives in which the reader's likelihood under each document alone teaches the retriever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_training.choices import (
    DIRECTIONS,
    TEACHER_LOSSES,
    TEACHERS,
    check_choice,
    check_positive,
)
from dream_training.objectives.base import ReaderObjective
from dream_training.reading.likelihood import TargetLikelihood, target_likelihood
from dream_training.reading.pool import read_each

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.objectives.temperature import Temperature
    from dream_training.reading.reader import Reader


class _TaughtByLikelihood(ReaderObjective):
    """Reads every document alone, in front of every query that has it in its pool."""

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> TargetLikelihood:
        return target_likelihood(
            self.reader,
            read_each(self.reader, pool),
            query["texts"],
            query["targets"],
            query.get("pools"),
        )


class ReplugLoss(_TaughtByLikelihood):
    r"""RePlug's likelihood supervision, and Atlas's perplexity distillation.

    With the retriever's :math:`P_R = \mathrm{softmax}(s)`, :math:`s_d = \cos(q, d) / \tau`, and the
    reader's :math:`Q = \mathrm{softmax}(g / \tau_g)`:

    .. math:: L = \frac{1}{B} \sum_b \mathrm{KL}(P_R \,\|\, Q)
              \quad\text{or}\quad \mathrm{KL}(Q \,\|\, P_R)

    :math:`g_d` is the mean log-probability of a target token when the reader sees document
    :math:`d` alone, or its exponential, the probability per token.

    Source: Shi et al. 2023 (arXiv 2301.12652) with ``student_teacher``; Izacard et al. 2022
    (arXiv 2208.03299) with ``teacher_student`` and log-probabilities.

    Args:
        model: the retriever.
        reader: the frozen language model; its injected heads do not matter.
        temperature: :math:`\tau`, divides the cosine similarities.
        teacher: ``"mean_log_probability"`` or ``"probability"``, what :math:`g` is.
        teacher_temperature: :math:`\tau_g`, divides the teacher's scores.
        direction: ``"student_teacher"`` is :math:`\mathrm{KL}(P_R \| Q)`, ``"teacher_student"``
            the other one.
        mini_batch_size: texts that the retriever embeds at once; None for the whole batch.
        gather_across_devices: with several processes, compete over the documents of all of them.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "replug"

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature = 0.05,
        *,
        teacher: str = "mean_log_probability",
        teacher_temperature: float = 0.1,
        direction: str = "teacher_student",
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, reader, temperature, mini_batch_size, gather_across_devices)
        self.teacher = check_choice("teacher", teacher, TEACHERS)
        self.teacher_temperature = check_positive("teacher_temperature", teacher_temperature)
        self.direction = check_choice("direction", direction, DIRECTIONS)

    def loss(
        self,
        scores: Tensor,
        evidence: TargetLikelihood,
        query: dict[str, Any],
        pool: dict[str, Any],
    ) -> Tensor:
        taught = evidence.mean()
        if self.teacher == "probability":
            taught = taught.exp()
        return divergence(taught / self.teacher_temperature, scores, self.direction)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            **super().get_config_dict(),
            "teacher": self.teacher,
            "teacher_temperature": self.teacher_temperature,
            "direction": self.direction,
        }


def divergence(teacher: Tensor, scores: Tensor, direction: str) -> Tensor:
    r"""Mean over the queries of the KL divergence between two softmaxes over the documents.

    Args:
        teacher: ``[B, C]`` logits :math:`t`; what they are outside a query's pool does not matter.
        scores: ``[B, C]`` logits :math:`s` of the retriever, ``-inf`` outside a query's pool.
        direction: ``"teacher_student"`` for :math:`\mathrm{KL}(\mathrm{softmax}(t) \,\|\,
            \mathrm{softmax}(s))`, ``"student_teacher"`` for the other one.
    """
    # Documents outside a query's pool have no weight on either side.
    outside = scores.isneginf()
    first = torch.log_softmax(teacher.masked_fill(outside, -torch.inf), -1)
    second = torch.log_softmax(scores, -1)
    if direction == "student_teacher":
        first, second = second, first
    difference = (first - second).masked_fill(outside, 0.0)
    return (first.exp() * difference).sum(-1).mean()


def margin_error(teacher: Tensor, scores: Tensor) -> Tensor:
    r"""Mean squared error of the margins of each query's best document over its others.

    With :math:`b` the document that the teacher prefers among the :math:`C` of a query,

    .. math:: \frac{1}{B} \sum \frac{1}{C - 1} \sum_{d \ne b}
              \big((s_b - s_d) - (t_b - t_d)\big)^2

    the loss of sentence-transformers' ``MarginMSELoss`` with that document as the positive. A
    query with one document has none.

    Source: Hofstätter et al. 2020 (arXiv 2010.02666).

    Args:
        teacher: ``[B, C]`` logits :math:`t`; what they are outside a query's pool does not matter.
        scores: ``[B, C]`` logits :math:`s` of the retriever, ``-inf`` outside a query's pool.
    """
    outside = scores.isneginf()
    best = teacher.masked_fill(outside, -torch.inf).argmax(-1, keepdim=True)
    # A score of -inf would make the gradient of its place NaN.
    difference = (scores - teacher).masked_fill(outside, 0.0)
    error = (difference.gather(1, best) - difference).square().masked_fill(outside, 0.0)
    others = (~outside).sum(-1) - 1
    return (error.sum(-1) / others.clamp(min=1)).mean()


@dataclass(frozen=True)
class TeacherLoss:
    """What a retriever's scores lose against a teacher's logits.

    Attributes:
        kind: ``"kl"``, the divergence of :func:`divergence`; or ``"margin"``, the error of
            :func:`margin_error`.
        temperature: divides the teacher's logits.
        direction: of the divergence.

    Raises:
        ValueError: a value is out of range.
    """

    kind: str = "kl"
    temperature: float = 3.0
    direction: str = "teacher_student"

    def __post_init__(self) -> None:
        check_choice("teacher_loss", self.kind, TEACHER_LOSSES)
        check_positive("teacher_temperature", self.temperature)
        check_choice("direction", self.direction, DIRECTIONS)

    def __call__(self, logits: Tensor, scores: Tensor) -> Tensor:
        """Return the mean over the queries.

        Args:
            logits: ``[B, C]`` of the teacher.
            scores: ``[B, C]`` of the retriever, ``-inf`` outside a query's pool.
        """
        if self.kind == "margin":
            return margin_error(logits / self.temperature, scores)
        return divergence(logits / self.temperature, scores, self.direction)

    def describe(self) -> dict[str, Any]:
        """What a model card says of it."""
        own = {"teacher_loss": self.kind, "teacher_temperature": self.temperature}
        return own if self.kind == "margin" else {**own, "direction": self.direction}


class EmdrLoss(_TaughtByLikelihood):
    r"""EMDR²: the likelihood of the target, marginalised over the documents token by token.

    .. math:: L = -\frac{1}{T} \sum_t \log \sum_d P_R(d \mid q)\, p(y_t \mid y_{<t}, q, d),
              \qquad P_R = \mathrm{softmax}(\cos(q, \cdot) / \tau)

    The reader is frozen, so only the retriever's side of the original objective is left.

    Source: Sachan et al. 2021 (arXiv 2106.05346).

    Args:
        model: the retriever.
        reader: the frozen language model; its injected heads do not matter.
        temperature: divides the cosine similarities.
        mini_batch_size: texts that the retriever embeds at once; None for the whole batch.
        gather_across_devices: with several processes, compete over the documents of all of them.

    Raises:
        ValueError: ``temperature`` is not positive, or ``mini_batch_size`` below 1.
    """

    name = "emdr"

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature = 0.05,
        *,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, reader, temperature, mini_batch_size, gather_across_devices)

    def terms(self, evidence: TargetLikelihood, query: dict[str, Any], pool: dict[str, Any]) -> int:
        return int(evidence.token_mask.sum())

    def loss(
        self,
        scores: Tensor,
        evidence: TargetLikelihood,
        query: dict[str, Any],
        pool: dict[str, Any],
    ) -> Tensor:
        joint = evidence.log_probabilities + torch.log_softmax(scores, -1)[:, :, None]
        of_token = torch.logsumexp(joint, dim=1)  # [B, T]
        return -of_token[evidence.token_mask].mean()
