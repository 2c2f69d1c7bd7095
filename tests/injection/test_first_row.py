"""Scores that act on some rows alone: the others attend plainly, exactly."""

from __future__ import annotations

import pytest
import torch

from dream_kernels import inject_attention, read_jointly
from helpers.injected_models import VOCABULARY, make_model, register_oracle, target_loss

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])
ROWS = 20


def _inputs(padding: str | None):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, ROWS), generator=g)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :1] = 0
    elif padding == "right":
        mask[1, -2:] = 0
    scores = 1.5 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    return ids, mask, scores.requires_grad_()


@pytest.mark.parametrize("padding", (None, "left", "right"))
@pytest.mark.parametrize("mode", ("reweight", "bias"))
@pytest.mark.parametrize("first_row", (0, 5, 14, 16))
@pytest.mark.parametrize("name", ("Llama", "Gemma3"))
def test_rows_before_the_first_attend_plainly(name, first_row, mode, padding) -> None:
    """Against a loop over rows and documents; all tokens after the documents are predicted."""
    ids, mask, scores = _inputs(padding)
    is_target = mask.bool() & (torch.arange(ROWS) >= 15)
    model = make_model(name)
    with inject_attention(model, HEADS, mode=mode):
        logits = model(
            ids,
            attention_mask=mask,
            document_scores=scores,
            document_spans=SPANS,
            document_first_row=first_row,
        ).logits
    loss = target_loss(logits, ids, is_target)
    (gradient,) = torch.autograd.grad(loss, scores)

    documents = torch.full((2, ROWS), -1)
    for c, (start, end) in enumerate(SPANS[0].tolist()):
        documents[:, start:end] = c
    documents[mask == 0] = -1
    model.config._attn_implementation = register_oracle(HEADS, mode, None)
    expected_logits = model(
        ids,
        attention_mask=mask,
        oracle_scores=scores,
        oracle_documents=documents,
        oracle_scored=(torch.arange(ROWS) >= max(14, first_row)).expand(2, -1),
    ).logits
    expected = target_loss(expected_logits, ids, is_target)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first_row", (0, 3, 6))
def test_with_a_prefix_rows_count_from_its_end(first_row: int) -> None:
    ids, mask, scores = _inputs("right")
    is_target = mask.bool() & (torch.arange(ROWS) >= 16)
    model = make_model("Qwen2")
    with inject_attention(model, HEADS):
        whole = model(
            ids,
            attention_mask=mask,
            document_scores=scores,
            document_spans=SPANS,
            document_first_row=14 + first_row,
        ).logits
        expected = target_loss(whole, ids, is_target)
        pools = read_jointly(model, ids[:, :14], SPANS.expand(2, -1, -1))
        own = model(
            ids[:, 14:],
            attention_mask=mask[:, 14:],
            document_prefix=pools,
            document_scores=scores,
            document_first_row=first_row,
        ).logits
    loss = target_loss(own, ids[:, 14:], is_target[:, 14:])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    if first_row == 6:  # after the last row: nothing is scored
        assert not loss.requires_grad and not expected.requires_grad
        return
    (gradient,) = torch.autograd.grad(loss, scores)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    assert expected_gradient.abs().max() > 1e-5
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_bad_first_rows_are_refused() -> None:
    ids, _, scores = _inputs(None)
    model = make_model("Llama")
    with inject_attention(model, HEADS):
        documents = {"document_scores": scores, "document_spans": SPANS}
        with pytest.raises(ValueError, match=r"document_first_row must lie in 0 \.\. 20, got 21"):
            model(ids, **documents, document_first_row=21)
        with pytest.raises(TypeError, match="document_first_row must be an int, got float"):
            model(ids, **documents, document_first_row=1.5)
