"""DreamLoss in an ordinary SentenceTransformerTrainer."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from dream_kernels.dispatch import select
from dream_kernels.injection import attention
from dream_kernels.reference import attend
from dream_kernels.validation import build_problem
from dream_training.models.retriever import build_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.dream import DreamLoss
from dream_training.reading.reader import Reader
from helpers.objectives import features, repeated_steps
from helpers.tiny import HEADS, make_decoder, make_rows, make_tokenizer


def make_loss(tiny_model, dtype: torch.dtype = torch.float32, **options) -> DreamLoss:
    torch.manual_seed(0)
    model = build_retriever(tiny_model, layers=2, lora_r=4, dtype="float32", device="cpu").to(dtype)
    reader = Reader(make_decoder().to(dtype), make_tokenizer(), HEADS, **options)
    return DreamLoss(model, reader, temperature=0.1)


def adapter_gradients(loss: DreamLoss, inputs: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    value = loss(inputs)
    parameters = [p for p in loss.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters)
    return value, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("context", ("independent", "joint"))
@pytest.mark.parametrize("impl", ("reference", "cpu"))
def test_the_retrievers_gradient_equals_that_of_plain_autograd(
    tiny_model, impl: str, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hand-written backward against autograd through the forward formulas."""
    dtype = torch.float64 if impl == "reference" else torch.float32
    tolerance = 1e-9 if impl == "reference" else 2e-3
    loss = make_loss(tiny_model, dtype, impl=impl, context=context)
    for parameter in loss.model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B starts at zero
            parameter.data.normal_(std=0.3)
    inputs = features(loss.model, make_rows(4))
    value, gradient = adapter_gradients(loss, inputs)

    def formulas(reading, impl, *tensors, **options):
        problem = build_problem(*tensors, **options)
        assert select(problem, impl).name == impl
        return attend(problem)

    monkeypatch.setattr(attention.api, "attend", formulas)
    expected, expected_gradient = adapter_gradients(loss, inputs)
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert error < tolerance


def run_trainer(tiny_model, tmp_path, steps: int = 4) -> list[float]:
    loss = make_loss(tiny_model)
    losses: list[float] = []
    loss.register_forward_hook(lambda _, __, value: losses.append(value.item()))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4,
        learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=loss.model,
        args=args,
        train_dataset=Dataset.from_list(make_rows(16)),
        loss=loss,
        data_collator=DreamCollator(loss.model),
    ).train()
    return losses


def test_an_ordinary_trainer_learns_and_repeats_itself(tiny_model, tmp_path) -> None:
    first = run_trainer(tiny_model, tmp_path)
    assert len(first) == 4 and all(map(math.isfinite, first))
    assert len(set(first)) == 4
    assert run_trainer(tiny_model, tmp_path) == first


def test_repeated_steps_on_one_batch_lower_the_loss(tiny_model) -> None:
    values = repeated_steps(make_loss(tiny_model))
    assert values[-1] < values[0] - 0.01


def test_metrics_describe_the_batch(tiny_model) -> None:
    loss = make_loss(tiny_model)
    rows = make_rows(5)
    rows[3]["positive"] = -1
    inputs = features(loss.model, rows)
    value = loss(inputs)
    embeddings = [
        torch.nn.functional.normalize(
            loss.model({k: f[k] for k in ("input_ids", "attention_mask")})["sentence_embedding"],
            dim=-1,
        )
        for f in inputs
    ]
    weights = torch.softmax(embeddings[0] @ embeddings[1].T / 0.1, -1)
    known = [0, 1, 2, 4]
    assert loss.metrics["loss"] == pytest.approx(value.item())
    assert loss.metrics["weight_on_positive"] == pytest.approx(
        weights[known, known].mean().item(), rel=1e-4
    )
    entropy = -(weights * weights.log()).sum(-1).mean().item()
    assert loss.metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert loss.metrics["max_entropy"] == pytest.approx(math.log(5))


def test_only_the_adapters_train(tiny_model) -> None:
    loss = make_loss(tiny_model)
    loss(features(loss.model, make_rows(3))).backward()
    with_gradient = {name for name, p in loss.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora_" in name for name in with_gradient)


def test_without_the_collator_the_loss_says_what_to_do(tiny_model) -> None:
    loss = make_loss(tiny_model)
    encoded = loss.model.preprocess(["a", "b"])
    with pytest.raises(ValueError, match=r"data_collator=DreamCollator\(model\)"):
        loss([encoded, encoded])


def test_temperature_must_be_positive(tiny_model) -> None:
    loss = make_loss(tiny_model)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        DreamLoss(loss.model, loss.reader, temperature=0)


def test_the_pool_holds_every_candidate_once(tiny_model) -> None:
    collator = DreamCollator(make_loss(tiny_model).model)
    batch = collator(
        [
            {"query": "q1", "target": "t", "documents": ["a", "b"], "positive": 1},
            {"query": "q2", "target": "t", "documents": ["b", "c"]},
        ]
    )
    assert batch["document_texts"] == ["a", "b", "c"]
    assert batch["query_positives"] == [1, -1]
    assert batch["document_input_ids"].shape[0] == 3


def test_columns_of_other_objectives_are_taken_too(tiny_model) -> None:
    collator = DreamCollator(make_loss(tiny_model).model)
    rows = [
        {"query": "q1", "positive": "a", "negative": "b", "target": "t"},
        {"query": "q2", "positive": "c", "negative": "a", "target": "t"},
    ]
    batch = collator(rows)
    assert batch["document_texts"] == ["a", "b", "c"]
    assert batch["query_positives"] == [0, 2]


def test_missing_columns_are_named(tiny_model) -> None:
    collator = DreamCollator(make_loss(tiny_model).model)
    with pytest.raises(ValueError, match="target is missing from query, documents"):
        collator([{"query": "q", "documents": ["a"]}])
    with pytest.raises(ValueError, match=r"documents .* got query, target"):
        collator([{"query": "q", "target": "t"}])


def test_lengths_of_queries_and_documents_are_cut_apart(tiny_model) -> None:
    model = make_loss(tiny_model).model
    batch = DreamCollator(model, query_max_len=5, passage_max_len=9)(
        [{"query": "q" * 50, "target": "t", "documents": ["d" * 50]}]
    )
    assert batch["query_input_ids"].shape[1] == 5
    assert batch["document_input_ids"].shape[1] == 9
    # the end-of-sequence token, whose state is the embedding, survives the cut
    assert batch["query_input_ids"][0, -1] == batch["document_input_ids"][0, -1] == 2
    assert model.max_seq_length == 128
