"""DREAM's reading as a teacher: what each document would be worth, from one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dream_training.distributed import world
from dream_training.objectives.distillation import TeacherLoss
from dream_training.objectives.dream import PoolReading
from dream_training.objectives.temperature import Temperature
from dream_training.objectives.verdicts import Verdicts, reader_identity, verdict_keys
from dream_training.reading.reader import Reader
from dream_training.reading.verdict import judge

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class DistilledDreamLoss(PoolReading):
    r"""DREAM, with the reader's gradient in the weights as a teacher of the retriever's scores.

    The loss of :class:`~dream_training.objectives.dream.DreamLoss` reaches a score through
    :math:`\partial L / \partial s_d = w_d (G_d - \sum_e w_e G_e)`, :math:`G_d = \partial L /
    \partial w_d`: a relevant document that the retriever overlooks, with a small :math:`w_d`, is
    hardly ever corrected, and a query whose loss moves little counts little. Here the reader reads
    with the same weight on each of the :math:`C` documents, and one backward pass tells how
    :math:`T_b L_b`, the loss summed over a query's target tokens, would change with the weight of
    each:

    .. math:: u_d = -T_b \Big(\frac{\partial L_b}{\partial w_d} -
              \frac{1}{C} \sum_e \frac{\partial L_b}{\partial w_e}\Big)
              = -C\, T_b \frac{\partial L_b}{\partial s_d}

    To first order :math:`u_d` is how much more likely, in nats, the target becomes when document
    :math:`d` alone is read. The retriever learns the distribution that follows,

    .. math:: L = \frac{1}{B} \sum_b \mathrm{KL}\big(\mathrm{softmax}(u / \tau_u) \,\|\,
              \mathrm{softmax}(\cos(q, \cdot) / \tau)\big)

    as in RePlug, whose teacher takes :math:`B \cdot C` readings where this one takes :math:`B`.
    There are no relevance labels. The reading does not depend on the retriever.

    Source: the attention is that of Tang & Yang 2026 (arXiv 2606.24667), the divergence that of
    Izacard et al. 2022 (arXiv 2208.03299); their combination is this project's own. What it gains
    is in ``docs/experiments.md``.

    Args:
        model: the retriever.
        reader: the frozen language model, with the heads that receive the weights. In mode
            ``"bias"`` it reads as it would without scores, and :math:`s_d` is what would be added
            to the attention logits.
        temperature: :math:`\tau`, as in :class:`~dream_training.objectives.dream.DreamLoss`.
        teacher_temperature: :math:`\tau_u`, in nats.
        direction: ``"teacher_student"``, as above, or ``"student_teacher"``, the other divergence.
        teacher_loss: ``"kl"``, as above, or ``"margin"``, the squared error of the margins of the
            document that the teacher prefers, see
            :func:`~dream_training.objectives.distillation.margin_error`.
        mini_batch_size: as in :class:`~dream_training.objectives.dream.DreamLoss`.
        gather_across_devices: as there.
        verdicts: keeps what the reader said, in this training or in another one that was given
            the same object. A query with a pool of its own that was read before with the same
            target is not read again; of a pool that queries share, the batch is read again if one
            of them was not. None keeps nothing.

    Attributes:
        metrics: as there, but ``loss`` is the divergence, in nats per query.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        reader: Reader,
        temperature: float | Temperature = 0.05,
        *,
        teacher_temperature: float = 3.0,
        direction: str = "teacher_student",
        teacher_loss: str = "kl",
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        verdicts: Verdicts | None = None,
    ) -> None:
        super().__init__(model, reader, temperature, mini_batch_size, gather_across_devices)
        self.verdicts = verdicts
        self._identity: str | None = None
        self.teacher_loss = TeacherLoss(teacher_loss, teacher_temperature, direction)

    def read(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        """What each document is worth to the reader, ``[B, C]`` in nats, without a graph."""
        if self.verdicts is None:
            return self._judge(query, pool)
        keys, sizes = self._keys(query, pool)
        unknown = self.verdicts.unknown(keys)
        # Reading one query of a shared pool costs nearly as much as reading all; and the processes
        # of a sharded reader, or of a shared pool, read together.
        alone = query.get("pools") is not None and not self.reader.sharded
        if not alone:
            unknown = list(range(len(keys))) if world.max_over_ranks(int(bool(unknown))) else []
        self.verdicts.count(len(keys) - len(unknown), len(unknown))
        self._read_tokens = 0
        if unknown:
            part = (query, pool) if len(unknown) == len(keys) else _part_of(query, pool, unknown)
            worth = self._judge(*part)
            self.verdicts.put([keys[i] for i in unknown], worth, [sizes[i] for i in unknown])
            if len(unknown) == len(keys):
                return worth
        return self.verdicts.get(keys).to(self.reader.device)

    def _keys(self, query: dict[str, Any], pool: dict[str, Any]) -> tuple[list[str], list[int]]:
        """The keys of the queries, and the sizes of their pools."""
        if self._identity is None:
            assert self.verdicts is not None
            self._identity = reader_identity(self.reader) if self.verdicts.shared else ""
        texts = pool["texts"]
        pools = query.get("pools")
        own = (
            [texts] * len(query["texts"])
            if pools is None
            else [[texts[i] for i in p] for p in pools]
        )
        keys = verdict_keys(self._identity, query["texts"], query["targets"], own)
        return keys, list(map(len, own))

    def _judge(self, query: dict[str, Any], pool: dict[str, Any]) -> Tensor:
        prefix = self.read_documents(query, pool)
        verdict = judge(self.reader, prefix, query["texts"], query["targets"])
        self.count_read(prefix, pool, verdict.target_tokens)
        return verdict.logits

    def loss(
        self, scores: Tensor, evidence: Tensor, query: dict[str, Any], pool: dict[str, Any]
    ) -> Tensor:
        return self.teacher_loss(evidence, scores)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {
            **super().get_config_dict(),
            "teaching": "distilled",
            **self.teacher_loss.describe(),
        }


def _part_of(
    query: dict[str, Any], pool: dict[str, Any], rows: list[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The texts of some queries of a batch, and of the documents in their pools."""
    needed = sorted({document for b in rows for document in query["pools"][b]})
    place = {document: i for i, document in enumerate(needed)}
    return (
        {
            "texts": [query["texts"][b] for b in rows],
            "targets": [query["targets"][b] for b in rows],
            "pools": [[place[document] for document in query["pools"][b]] for b in rows],
        },
        {"texts": [pool["texts"][document] for document in needed]},
    )
