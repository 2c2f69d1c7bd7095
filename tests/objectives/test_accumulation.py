"""Gradients accumulated over batches are those of one batch of the same pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import TrainerCallback

from dream_training.models.retriever import build_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distillation import EmdrLoss, ReplugLoss
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.infonce import PoolInfoNCELoss
from dream_training.objectives.revela import TEXT_PROMPT, RevelaLoss
from dream_training.objectives.temperature import Temperature
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from helpers.objectives import split
from helpers.tiny import HEADS, WORDS, in_double, make_decoder, make_tokenizer, quiet

ROWS = [
    {
        "query": f"where is {WORDS[i]} {i}?",
        "target": "long way " * 3 + "go on" if i % 2 else WORDS[i][:4],
        "documents": [f"{WORDS[i]} is at {i}" + " and more" * i, f"not {WORDS[i]}", "nothing"],
        "positive": 0,
    }
    for i in range(5)
]


class RecordingCollator(DreamCollator):
    """Keeps the rows of each batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[list[dict]] = []

    def __call__(self, rows: list[dict]) -> dict:
        if rows:
            self.batches.append(rows)
        return super().__call__(rows)


class KeepGradients(TrainerCallback):
    def __init__(self, loss: torch.nn.Module) -> None:
        self.loss = loss
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.found.append(gradient_of(self.loss))


def gradient_of(loss: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in loss.parameters() if p.requires_grad]).clone()


def make_loss(folder: Path, objective: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_retriever(folder, layers=2, lora_r=4, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B starts at zero
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    in_double(model)

    def reader(heads: dict, **options: Any) -> Reader:
        decoder = in_double(make_decoder())
        return Reader(decoder, make_tokenizer(), heads, impl="reference", **options)

    if objective == "dream":
        return DreamLoss(model, reader(HEADS), Temperature(0.1, learnable=True).double())
    if objective == "distilled":
        return DistilledDreamLoss(model, reader(HEADS), 0.1)
    if objective == "replug":
        return ReplugLoss(model, reader({}), 0.1)
    if objective == "emdr":
        return EmdrLoss(model, reader({}), 0.1)
    if objective == "infonce":
        return PoolInfoNCELoss(model, 0.1)
    every = {layer: [0, 1, 2, 3] for layer in range(3)}
    return RevelaLoss(model, reader(every, prompt=TEXT_PROMPT, target_max_len=128), 0.1)


@pytest.mark.parametrize(
    "objective, clip",
    [
        *((name, 0.0) for name in ("dream", "distilled", "replug", "emdr", "infonce", "revela")),
        ("dream", 1e9),
    ],
)
def test_a_plain_trainer_accumulates_the_gradient_of_one_batch(
    tiny_model, tmp_path: Path, objective: str, clip: float
) -> None:
    """Batches of two, two and one queries, and of unequal targets, make one step.

    With pools of their own the queries are the same in any batch; Revela has one pool a batch, and
    is compared with the sum over these batches.
    """
    loss = make_loss(tiny_model, objective)
    collator = RecordingCollator(loss.model, pool="both" if objective == "revela" else "mined")
    keep = KeepGradients(loss)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, learning_rate=0.0, max_grad_norm=clip, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=loss.model, args=args, train_dataset=Dataset.from_list(ROWS), loss=loss,
        data_collator=collator, callbacks=[keep],
    ).train()  # fmt: skip
    metrics = dict(loss.metrics)
    assert [len(rows) for rows in collator.batches] == [2, 2, 1] * 2
    loss.train()
    for step, found in enumerate(keep.found):
        batches = list(collator.batches[3 * step : 3 * step + 3])
        if objective != "revela":
            batches = [[row for rows in batches for row in rows]]
        loss.zero_grad()
        total, terms = torch.zeros((), dtype=torch.float64), 0
        for rows in batches:
            value = loss(split(collator(rows)))
            own = getattr(loss, "_target_tokens", 1)
            total, terms = total + own * value, terms + own
        (total / terms).backward()
        expected = gradient_of(loss)
        assert expected.norm() > 1e-4
        assert (found - expected).norm() < 1e-9 * expected.norm()
    assert metrics["loss"] == pytest.approx((total / terms).item(), rel=1e-9)


def test_a_custom_loop_keeps_its_gradients(tiny_model) -> None:
    """Nothing says there which batches make a step: each has the gradient of its mean."""
    loss = make_loss(tiny_model, "dream")
    collator = DreamCollator(loss.model, pool="mined")
    expected = 0
    for rows in (ROWS[:1], ROWS[1:2]):
        loss.zero_grad()
        loss(split(collator(rows))).backward()
        expected = expected + gradient_of(loss)
    loss.zero_grad()
    for rows in (ROWS[:1], ROWS[1:2]):
        loss(split(collator(rows))).backward()
    torch.testing.assert_close(gradient_of(loss), expected, rtol=1e-9, atol=1e-12)


def test_a_run_accumulates(run) -> None:
    """Two batches of four queries a step; the metrics are those of all eight."""
    result = train(run(gradient_accumulation_steps=2, eval_data=None), console=quiet())
    steps = result.history.steps
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    one = train(run(eval_data=None, output_dir=str(result.path.parent / "one")), console=quiet())
    assert steps[0]["tokens"] > 1.5 * one.history.steps[0]["tokens"]
    with pytest.raises(ValueError, match="at least 7 batches of 4 lines, got 24"):
        train(run(gradient_accumulation_steps=7, output_dir="unused"), console=quiet())
