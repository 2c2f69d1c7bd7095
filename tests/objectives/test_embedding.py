"""Gradient caching: the direct gradient, one mini-batch of activations at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from dream_training.models.retriever import build_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.embedding import embed
from dream_training.reading.reader import Reader
from helpers.tiny import make_decoder, make_rows, make_tokenizer

TEXTS = ["one", "a second text that is longer", "3", "the fourth, again rather long", "five"]


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    model = build_retriever(tiny_model, layers=2, lora_r=4, dtype="float32", device="cpu").double()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B starts at zero
            parameter.data.normal_(std=0.3)
    return model


def gradients(model, embeddings: torch.Tensor) -> torch.Tensor:
    """Of a sum in which every embedding pulls in another direction."""
    pull = torch.arange(embeddings.numel(), dtype=torch.float64).sin().view_as(embeddings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad((embeddings * pull).sum(), parameters)]
    )


def add_dropout(model) -> None:
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.3)
    model.train()


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("size", (1, 2, 5, 100))
def test_gradient_equals_the_direct_one(model, size: int, side: str) -> None:
    model.tokenizer.padding_side = side
    features = model.preprocess(TEXTS)
    assert not features["attention_mask"].all()
    direct = embed(model, features)
    cached = embed(model, features, size)
    torch.testing.assert_close(cached, direct, rtol=1e-10, atol=1e-10)
    expected = gradients(model, direct)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradients(model, cached), expected, rtol=1e-10, atol=1e-10)


def test_dropout_draws_the_same_masks_again(model) -> None:
    """Against the same mini-batches embedded once, with everything kept."""
    add_dropout(model)
    features = model.preprocess(TEXTS)
    torch.manual_seed(1)
    cached = embed(model, features, 2)
    after = torch.get_rng_state()
    gradient = gradients(model, cached)
    assert torch.equal(torch.get_rng_state(), after), "the second pass moved the generator"
    torch.manual_seed(1)
    parts = [
        {k: v[i : i + 2] for k, v in features.items() if torch.is_tensor(v)} for i in (0, 2, 4)
    ]
    for part in parts:
        length = int(part["attention_mask"].sum(1).max())
        part |= {k: v[:, :length] for k, v in part.items()}
    direct = torch.cat([model(part)["sentence_embedding"] for part in parts])
    torch.testing.assert_close(cached, direct, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, gradients(model, direct), rtol=1e-10, atol=1e-10)
    torch.manual_seed(2)
    assert not torch.allclose(embed(model, features, 2), cached)


def test_one_mini_batch_of_activations_is_alive(model) -> None:
    features = model.preprocess(TEXTS)
    made: list[weakref.ref] = []
    alive: list[int] = []

    def watch(module, inputs, output) -> None:
        made.append(weakref.ref(output))
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))

    handle = model[0].auto_model.layers[0].mlp.act_fn.register_forward_hook(watch)
    cached = embed(model, features, 1)
    gc.collect()
    assert len(made) == 5 and max(alive) == 1
    assert not any(ref() is not None for ref in made)
    gradients(model, cached)
    assert len(made) == 10 and max(alive) == 1
    made.clear()
    kept = embed(model, features)
    assert made[0]() is not None
    handle.remove()
    del kept


@pytest.mark.parametrize("dropout", (False, True))
def test_the_objective_has_the_direct_gradient(model, dropout: bool, monkeypatch) -> None:
    """From the reader's loss to the adapters; with dropout, of the same mini-batches kept whole."""
    reader = Reader(make_decoder().double(), make_tokenizer(), {0: [1], 1: [0, 3]})
    batch = DreamCollator(model)(make_rows(5))
    inputs = [
        {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
        for prefix in ("query_", "document_")
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if dropout:
        add_dropout(model)

    def run(size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        loss = DreamLoss(model, reader, temperature=0.1, mini_batch_size=size)(inputs)
        return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    loss, gradient = run(2)
    monkeypatch.setattr(
        "dream_training.objectives.embedding.checkpoint", lambda run, *args, **_: run(*args)
    )
    expected_loss, expected = run(2 if dropout else None)
    assert expected.abs().max() > 1e-5
    # scores and losses are float32 regardless of the retriever's dtype
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_without_gradient_there_is_no_graph(model) -> None:
    with torch.no_grad():
        assert not embed(model, model.preprocess(TEXTS), 2).requires_grad


def test_mistakes_are_named(model) -> None:
    features = model.preprocess(TEXTS)
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, got 0"):
        embed(model, features, 0)
    with pytest.raises(ValueError, match=r"attention_mask of .* got input_ids: packed"):
        embed(model, {"input_ids": features["input_ids"]}, 2)
