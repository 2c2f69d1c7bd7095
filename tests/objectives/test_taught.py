"""Losses against a teacher's logits: margins by hand, and what a batch must bring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dream_training.config_groups import DataConfig
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distillation import TeacherLoss, margin_error
from dream_training.objectives.taught import TaughtCollator, TaughtDreamLoss
from helpers.objectives import make_retriever, split, with_candidates


def test_margins_by_hand() -> None:
    """The teacher's best document is the positive; a smaller pool counts as a larger one."""
    teacher = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.0, 99.0]])
    scores = torch.tensor([[0.5, 1.0, 0.0], [3.0, -1.0, -torch.inf]], requires_grad=True)
    first = ((0.5 - 3.0) ** 2 + (1.0 - 4.0) ** 2) / 2
    second = (4.0 - 2.0) ** 2
    value = margin_error(teacher, scores)
    torch.testing.assert_close(value.item(), (first + second) / 2)
    (gradient,) = torch.autograd.grad(value, scores)
    assert gradient.isfinite().all() and gradient[1, 2] == 0
    torch.testing.assert_close(gradient[1], torch.tensor([2.0, -2.0, 0.0]))
    # A query with one document has no margin.
    assert margin_error(torch.tensor([[3.0]]), torch.tensor([[1.0]])) == 0
    loss = TeacherLoss("margin", temperature=2.0)
    torch.testing.assert_close(loss(2 * teacher, scores), value)
    assert loss.describe() == {"teacher_loss": "margin", "teacher_temperature": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_loss": "mse"}, r"teacher_loss must be one of .* got 'mse'"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be positive, got 0.0"),
        ({"direction": "both"}, r"direction must be one of .* got 'both'"),
    ],
)
def test_bad_options_are_named(tiny_model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaughtDreamLoss(make_retriever(tiny_model), **options)


def test_a_batch_without_logits_is_refused(tiny_model) -> None:
    model = make_retriever(tiny_model)
    loss = TaughtDreamLoss(model)
    rows = with_candidates()
    with pytest.raises(ValueError, match="give the trainer data_collator=TaughtCollator"):
        loss(split(DreamCollator(model, pool="mined")(rows)))
    taught = [{**row, "logits": [float(i) for i, _ in enumerate(row["documents"])]} for row in rows]
    value = loss(split(TaughtCollator(model)(taught)))
    assert value.item() > 0 and loss.metrics["weight_on_positive"] > 0
    card = loss.get_config_dict()
    assert card["teaching"] == "taught" and card["teacher_temperature"] == 3.0


def test_lines_in_which_the_teacher_disagrees_are_left_out(tiny_model: Path) -> None:
    model = make_retriever(tiny_model)
    rows = [{**row, "logits": [0.0] * len(row["documents"])} for row in with_candidates()]
    for row in rows[:2]:
        row["logits"][row["positive"]] = 1.0
    rows[2]["positive"] = -1
    for row in rows[3:]:
        row["logits"][(row["positive"] + 1) % len(row["documents"])] = 1.0
    assert len(rows) > 3
    batch = TaughtCollator(model, agreeing=True)(rows)
    assert batch["query_texts"] == [row["query"] for row in rows[:3]]
    assert batch["query_logits"] == [row["logits"] for row in rows[:3]]
    assert set(batch["document_texts"]) == {text for row in rows[:3] for text in row["documents"]}
    # A batch is never empty, and by default it is whole.
    assert len(TaughtCollator(model, agreeing=True)(rows[3:])["query_texts"]) == len(rows) - 3
    assert len(TaughtCollator(model)(rows)["query_texts"]) == len(rows)
    with pytest.raises(ValueError, match="taught_agreeing must be false unless taught is given"):
        DataConfig("train.jsonl", taught_agreeing=True)
