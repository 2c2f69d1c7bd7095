"""Temperatures that are constant, change over a run, or are learned."""

from __future__ import annotations

import io
import itertools
import json
import math

import pytest
import torch
from rich.console import Console

from dream_training.choices import LEARNABLE_RANGE, OBJECTIVES
from dream_training.config import TrainConfig
from dream_training.models.retriever import build_retriever
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.infonce import PoolInfoNCELoss
from dream_training.objectives.temperature import Temperature
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from helpers.objectives import features
from helpers.tiny import make_decoder, make_rows, make_tokenizer


@pytest.mark.parametrize(
    "schedule, middle",
    (("linear", 0.11), ("cosine", 0.11), ("exponential", math.sqrt(0.2 * 0.02))),
)
def test_schedules_begin_and_end_where_they_say(schedule: str, middle: float) -> None:
    temperature = Temperature(0.2, 0.02, schedule)
    values = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        temperature.progress = progress
        values.append(temperature())
    assert values[0] == pytest.approx(0.2) and values[-1] == pytest.approx(0.02)
    assert values[2] == pytest.approx(middle)
    assert values == sorted(values, reverse=True)
    quarter = {
        "linear": 0.155,
        "cosine": 0.02 + 0.18 * (1 + math.cos(math.pi / 4)) / 2,
        "exponential": 0.2 * 0.1**0.25,
    }
    assert values[1] == pytest.approx(quarter[schedule])


def test_a_learned_temperature_gets_the_gradient_of_the_loss(tiny_model) -> None:
    """Against differences of the loss at two constant temperatures."""
    torch.manual_seed(0)
    model = build_retriever(tiny_model, layers=2, lora_r=4, dtype="float32", device="cpu")
    rows = make_rows(4)

    def loss(temperature: float | Temperature) -> torch.Tensor:
        objective = PoolInfoNCELoss(model.double(), temperature)
        return objective(features(objective.model, rows))

    learned = Temperature(0.1, learnable=True)
    (gradient,) = torch.autograd.grad(loss(learned), learned.log)
    step = 1e-2
    with torch.no_grad():
        difference = loss(0.1 * math.exp(step)) - loss(0.1 * math.exp(-step))
    assert gradient.item() == pytest.approx(difference.item() / (2 * step), rel=1e-2)
    assert gradient.abs() > 1e-3


def test_a_learned_temperature_stays_in_range_and_comes_back() -> None:
    temperature = Temperature(0.05, learnable=True)
    for value, bound in ((-50.0, LEARNABLE_RANGE[0]), (50.0, LEARNABLE_RANGE[1])):
        temperature.log.data.fill_(value)
        own = temperature()
        assert own.item() == pytest.approx(bound, rel=1e-5)
        own.backward()
        assert temperature.log.grad.abs() > 0, "a clamp inside the graph would hold it for good"
        temperature.log.grad = None


def test_the_objective_saves_what_it_learned(tiny_model) -> None:
    model = build_retriever(tiny_model, layers=1, lora_r=2, dtype="float32", device="cpu")
    reader = Reader(make_decoder(), make_tokenizer(), {0: [1]})

    def make(start: float) -> DreamLoss:
        return DreamLoss(model, reader, Temperature(start, learnable=True))

    loss, other = make(0.2), make(0.05)
    other.load_state_dict(loss.state_dict())
    assert other.temperature.value == pytest.approx(0.2)
    assert loss.get_config_dict()["temperature"] == pytest.approx(0.2)
    loss(features(loss.model, make_rows(3))).backward()
    assert loss.temperature.log.grad.abs() > 0
    assert loss.metrics["temperature"] == pytest.approx(0.2)
    constant = DreamLoss(model, reader, 0.1)
    constant([dict(f) for f in features(constant.model, make_rows(3))])
    assert "temperature" not in constant.metrics
    assert constant.get_config_dict()["temperature"] == 0.1


@pytest.fixture
def run(tiny_model, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, make_rows(8))))

    def run(**changes) -> tuple[list[float], list[float], str]:
        config = TrainConfig(
            reader=str(tiny_model), retriever=str(tiny_model), retriever_layers=1, lora_r=2,
            train_data=str(data), top_k=4, batch_size=4, max_steps=3, device="cpu", log_steps=1,
            learning_rate=1e-2, warmup_steps=0, output_dir=str(tmp_path / "out"), **changes,
        )  # fmt: skip
        console = Console(file=io.StringIO(), width=200)
        train(config, console=console, overwrite=True)
        steps = json.loads((tmp_path / "out" / "history.json").read_text())["steps"]
        return (
            [step.get("temperature") for step in steps],
            [step["loss"] for step in steps],
            console.file.getvalue(),
        )

    return run


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_follows_its_schedule(run, objective: str) -> None:
    temperatures, losses, printed = run(
        objective=objective,
        temperature=0.2,
        temperature_end=0.05,
        temperature_schedule="exponential",
    )
    assert temperatures == pytest.approx([0.2, 0.1, 0.05])
    assert "temperature 0.1000" in printed
    assert all(map(math.isfinite, losses))


def test_a_run_learns_its_temperature(run) -> None:
    temperatures, _, _ = run(temperature=0.2, learnable_temperature=True)
    assert temperatures[0] == pytest.approx(0.2)
    # AdamW's steps are about as long as the learning rate, here in the logarithm
    for before, after in itertools.pairwise(temperatures):
        assert 1e-4 < abs(math.log(after / before)) < 2e-2
    assert run(temperature=0.2)[0] == [None] * 3


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"temperature": -1}, "temperature must be positive, got -1"),
        ({"temperature_schedule": "step"}, "temperature_schedule must be one of .* got 'step'"),
        ({"temperature_end": 0.0}, r"temperature_end must be positive, got 0\.0"),
        (
            {"temperature_end": 0.1},
            r"got temperature_end 0\.1 with schedule 'constant'",
        ),
        ({"temperature_schedule": "linear"}, "got temperature_end None with schedule 'linear'"),
        (
            {
                "temperature_schedule": "linear",
                "temperature_end": 0.1,
                "learnable_temperature": True,
            },
            "must be 'constant' with learnable_temperature, got 'linear'",
        ),
        ({"temperature": 20, "learnable_temperature": True}, r"lie in 0\.001 \.\. 10\.0 .* got 20"),
    ),
)
def test_mistakes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(reader="r", train_data="d", **changes)
