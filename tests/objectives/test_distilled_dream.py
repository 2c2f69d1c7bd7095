"""The reader's gradient as a teacher: its value, its pools, and what it teaches."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objectives import (
    features,
    make_distilled_loss,
    repeated_steps,
    with_candidates,
)
from helpers.tiny import make_rows


def test_by_hand(tiny_model) -> None:
    """Worth log 2 nats more than the other at temperature 1: teacher (2/3, 1/3)."""
    worth = torch.tensor([[math.log(2.0), 0.0]])
    scores = torch.tensor([[math.log(3.0), 0.0]])  # student (3/4, 1/4)
    teacher, student = (2 / 3, 1 / 3), (0.75, 0.25)
    forward = sum(t * math.log(t / s) for t, s in zip(teacher, student))
    backward = sum(s * math.log(s / t) for t, s in zip(teacher, student))
    loss = make_distilled_loss(tiny_model, teacher_temperature=1.0)
    assert loss.loss(scores, worth, {}, {}).item() == pytest.approx(forward, rel=1e-5)
    # twice the temperature takes the square root of the teacher's odds
    loss = make_distilled_loss(tiny_model, teacher_temperature=0.5, direction="student_teacher")
    assert loss.loss(scores, worth / 2, {}, {}).item() == pytest.approx(backward, rel=1e-5)


@pytest.mark.parametrize(
    "reading",
    ({}, {"context": "joint"}, {"document_mass": 1.0}, {"mode": "bias"}),
    ids=("independent", "joint", "mass", "bias"),
)
def test_what_a_document_is_worth(tiny_model, reading: dict) -> None:
    """Against differences of the reader's summed loss when one document's score moves."""
    loss = make_distilled_loss(tiny_model, reading)
    query, pool = features(loss.model, make_rows(4))
    worth = loss.read(query, pool)
    assert worth.shape == (4, 4) and not worth.requires_grad
    assert worth.abs().max() > 1e-3
    # Weights that rise together change nothing; scores that are biases may.
    if reading.get("mode") != "bias":
        torch.testing.assert_close(worth.sum(1), torch.zeros(4).double(), rtol=0, atol=1e-10)
    prefix = loss.reader.read(pool["texts"])
    counts = torch.tensor([len(f" {target}") for target in query["targets"]])  # a token per byte

    def sums(scores: torch.Tensor) -> torch.Tensor:
        return loss.reader(prefix, query["texts"], query["targets"], scores).query_losses * counts

    step = 1e-2  # Llama's norms compute in single precision
    for document in range(4):
        moved = torch.zeros(4, 4, dtype=torch.float64)
        moved[:, document] = step
        slope = (sums(moved) - sums(-moved)) / (2 * step)
        torch.testing.assert_close(worth[:, document], -4 * slope, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("context", ("independent", "joint"))
def test_mined_pools_give_the_gradient_of_each_query_alone(tiny_model, context: str) -> None:
    """One batch against one query after the other, each a shared pool of its own candidates."""
    loss = make_distilled_loss(tiny_model, {"context": context})
    parameters = [p for p in loss.model.parameters() if p.requires_grad]

    def run(rows: list[dict], pool: str):
        value = loss(features(loss.model, rows, pool=pool))
        return value, torch.autograd.grad(value, parameters)

    rows = with_candidates()
    value, gradient = run(rows, "mined")
    alone = [run([row], "both") for row in rows]
    torch.testing.assert_close(value, sum(own for own, _ in alone) / 5)
    for i, actual in enumerate(gradient):
        expected = sum(own[i] for _, own in alone) / 5
        # Llama's norms compute in single precision.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert max(g.abs().max() for g in gradient) > 1e-4


def test_the_gradient_is_that_of_the_divergence(tiny_model) -> None:
    """The retriever's gradient is student minus teacher, and the reader's weights get none."""
    loss = make_distilled_loss(tiny_model)
    query, pool = inputs = features(loss.model, make_rows(4))
    teacher = torch.softmax(loss.read(query, pool) / 3.0, -1)
    scores = loss.scores(query, pool)
    parameters = [p for p in loss.model.parameters() if p.requires_grad]
    student = torch.softmax(scores, -1).detach()
    expected = torch.autograd.grad(scores, parameters, (student - teacher) / 4)
    for actual, wanted in zip(torch.autograd.grad(loss(inputs), parameters), expected):
        torch.testing.assert_close(actual, wanted)
    assert all(p.grad is None for p in loss.reader.model.parameters())


def test_it_can_be_evaluated_without_gradients(tiny_model) -> None:
    loss = make_distilled_loss(tiny_model)
    inputs = features(loss.model, make_rows(4))
    with torch.no_grad():
        value = loss(inputs)
    torch.testing.assert_close(value, loss(inputs).detach())
    assert loss.metrics["loss"] == pytest.approx(value.item())
    assert loss.metrics["max_entropy"] == pytest.approx(math.log(4))
    assert loss.metrics["tokens"] > 0
    card = loss.get_config_dict()
    assert card["teaching"] == "distilled" and card["teacher_temperature"] == 3.0


def test_repeated_steps_on_one_batch_lower_the_loss(tiny_model) -> None:
    values = repeated_steps(make_distilled_loss(tiny_model))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "both"}, "direction must be one of .* got 'both'"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be positive, got 0.0"),
    ],
)
def test_bad_options_are_named(tiny_model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_distilled_loss(tiny_model, **options)
