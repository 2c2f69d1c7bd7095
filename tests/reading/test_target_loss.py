"""The loss in chunks is the loss, and only models with a plain head take it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import dream_training.reading.target_loss as module
from dream_training.reading.reader import Reader
from dream_training.reading.target_loss import plain_head, target_losses
from helpers.tiny import make_decoder, make_tokenizer


@pytest.mark.parametrize("rows_of_a_chunk", (1, 3, 7, 100))
def test_losses_and_gradient_equal_those_of_all_logits(monkeypatch, rows_of_a_chunk: int) -> None:
    head = nn.Linear(8, 30, bias=False).requires_grad_(False)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 30 * rows_of_a_chunk)
    states = torch.randn(7, 8, requires_grad=True)
    targets, weights = torch.randint(30, (7,)), torch.randn(7)
    expected = nn.functional.cross_entropy(head(states), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected @ weights, states)
    losses = target_losses(head, states, targets)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.autograd.grad(losses @ weights, states)[0], gradient)


def test_no_logits_of_more_rows_than_a_chunk_are_made(monkeypatch) -> None:
    head, seen = nn.Linear(8, 30).requires_grad_(False), []
    head.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100)
    target_losses(head, torch.randn(7, 8), torch.zeros(7, dtype=torch.long))
    assert seen == [3, 3, 1]


def test_without_a_gradient_nothing_is_recorded() -> None:
    head = nn.Linear(8, 30).requires_grad_(False)
    targets = torch.zeros(2, dtype=torch.long)
    assert target_losses(head, torch.randn(2, 8), targets).grad_fn is None


@pytest.mark.parametrize("cap", (None, 0.5))
def test_a_head_whose_logits_are_capped_after_it_is_not_plain(cap: float | None) -> None:
    sizes = make_decoder().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = transformers.Gemma2Config(
        **{name: sizes[name] for name in names}, head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, final_logit_softcapping=cap, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    head = model.get_output_embeddings()
    head.weight.data *= 30.0  # so large that the cap bites
    assert plain_head(model) is (head if cap is None else None)


def test_a_reader_computes_the_same_with_and_without_a_plain_head() -> None:
    reader = Reader(make_decoder().double(), make_tokenizer(), {1: [0, 3]})
    assert reader._head is not None
    prefix, results = reader.read(["one document", "another"]), []
    for head in (reader._head, None):
        reader._head = head
        scores = torch.tensor([[0.5, -0.5], [1.0, 0.0]], requires_grad=True)
        reading = reader(prefix, ["a", "longer query"], ["yes", "no, not at all"], scores)
        reading.loss.backward()
        results.append((reading.loss.detach(), reading.query_losses, scores.grad))
    for plain, whole in zip(*results):
        torch.testing.assert_close(plain, whole, rtol=1e-5, atol=1e-7)
