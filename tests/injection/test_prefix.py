"""Reading with a prefix equals one full sequence, for every model class, with padding."""

from __future__ import annotations

import pytest
import torch

from dream_kernels import Prefix, inject_attention, read_independently, read_jointly, validation
from helpers.injected_models import NAMES, VOCABULARY, make_model, register_oracle, target_loss

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
every_model = pytest.mark.parametrize("name", NAMES)


def _tokens(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=g)


def _suffix(g: torch.Generator, batch: int = 2, rows: int = 7):
    """Suffixes padded on the left, their last three tokens being the target."""
    ids = _tokens(g, batch, rows)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    is_target = (torch.arange(rows) >= rows - 3).expand(batch, -1)
    scores = 1.5 * torch.randn(batch, 3, generator=g, dtype=torch.float64)
    return ids, mask, is_target, scores.requires_grad_()


def _loss_and_gradient(model, ids, is_target, scores, **inputs):
    logits = model(ids, document_scores=scores, **inputs).logits
    loss = target_loss(logits[:, -ids.shape[1] :], ids, is_target)
    return loss, torch.autograd.grad(loss, scores)[0]


def _of_full_sequence(model, documents, mask, ids, is_target, scores, spans):
    """Loss and gradient when documents and suffix are in one sequence."""
    logits = model(
        torch.cat([documents, ids], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        document_scores=scores,
        document_spans=spans,
    ).logits
    loss = target_loss(logits[:, documents.shape[1] :], ids, is_target)
    return loss, torch.autograd.grad(loss, scores)[0]


@pytest.mark.parametrize("mode,mass", (("reweight", None), ("reweight", 1.0), ("bias", None)))
@every_model
def test_shared_pool_equals_full_sequences(name: str, mode: str, mass: float | None) -> None:
    g = torch.Generator().manual_seed(1)
    documents = _tokens(g, 1, 15)
    spans = torch.tensor([[[1, 5], [5, 9], [10, 15]]])
    ids, mask, is_target, scores = _suffix(g)
    model = make_model(name)
    with inject_attention(model, HEADS, mode=mode, document_mass=mass):
        prefix = read_jointly(model, documents, spans)
        loss, gradient = _loss_and_gradient(
            model, ids, is_target, scores, attention_mask=mask, document_prefix=prefix
        )
        whole_mask = torch.cat([torch.ones(2, 15, dtype=torch.long), mask], 1)
        expected, expected_gradient = _of_full_sequence(
            model, documents.expand(2, -1), whole_mask, ids, is_target, scores, spans
        )
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@every_model
def test_per_query_pools_equal_full_sequences(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    documents = _tokens(g, 2, 15)
    pool_mask = torch.ones_like(documents)
    pool_mask[1, 12:] = 0
    spans = torch.tensor([[[1, 5], [5, 9], [10, 15]], [[1, 3], [7, 12], [0, 0]]])
    ids, mask, is_target, scores = _suffix(g)
    model = make_model(name)
    with inject_attention(model, HEADS):
        prefix = read_jointly(model, documents, spans, pool_mask)
        loss, gradient = _loss_and_gradient(
            model, ids, is_target, scores, attention_mask=mask, document_prefix=prefix
        )
        whole_mask = torch.cat([pool_mask, mask], 1)
        expected, expected_gradient = _of_full_sequence(
            model, documents, whole_mask, ids, is_target, scores, spans
        )
    assert expected_gradient[0].abs().max() > 1e-4 and expected_gradient[1, 2] == 0
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pools", (None, [[0, 2, 1], [3, 1]]), ids=("shared", "per_query"))
@pytest.mark.parametrize("name,window", [*((name, None) for name in NAMES), ("Gemma3", 12)])
def test_independent_reading_equals_one_sequence_with_a_block_mask(name, window, pools) -> None:
    """The oracle reads all documents in one sequence whose mask hides them from each other.

    A window counts by their positions: it reaches every document, and not the header.
    """
    g = torch.Generator().manual_seed(3)
    header = [1, 7]
    documents = [_tokens(g, n).tolist() for n in ((4, 3, 5) if pools is None else (4, 3, 5, 2))]
    ids, mask, is_target, scores = _suffix(g)
    model = make_model(name, **({} if window is None else {"sliding_window": window}))
    with inject_attention(model, HEADS):
        prefix = read_independently(model, documents, pools, header=header, batch_size=2)
        loss, gradient = _loss_and_gradient(
            model, ids, is_target, scores, attention_mask=mask, document_prefix=prefix
        )

    rows = [[0, 1, 2]] * 2 if pools is None else pools
    length = max(len(header) + sum(len(documents[i]) for i in pool) for pool in rows)
    total = length + ids.shape[1]
    whole = torch.zeros(2, total, dtype=torch.long)
    positions = torch.zeros(2, total, dtype=torch.long)
    owner = torch.full((2, total), -1)  # -1 header or suffix, -2 padding
    for b, pool in enumerate(rows):
        whole[b, :2] = torch.tensor(header)
        positions[b, :2] = torch.arange(2)
        at = 2
        for c, i in enumerate(pool):
            n = len(documents[i])
            whole[b, at : at + n] = torch.tensor(documents[i])
            positions[b, at : at + n] = 2 + torch.arange(n)
            owner[b, at : at + n] = c
            at += n
        owner[b, at:length] = -2
        whole[b, length:] = ids[b]
        start = 2 + max(len(documents[i]) for i in pool)
        positions[b, length:] = start + (mask[b].cumsum(0) - 1).clamp(min=0)
        owner[b, length:][mask[b] == 0] = -2
    place = torch.arange(total)
    visible = (place[None, :] <= place[:, None]) & (owner[:, None, :] != -2)
    other_document = (owner[:, None, :] >= 0) & (owner[:, None, :] != owner[:, :, None])
    visible &= ~(other_document & (place < length)[None, :, None])
    visible[:, place, place] = True  # a padding row sees itself, so that no softmax is empty
    additive = torch.zeros(2, 1, total, total, dtype=torch.float64)
    additive.masked_fill_(~visible[:, None], -1e30)
    model.config._attn_implementation = register_oracle(HEADS, "reweight", None)
    near = additive
    if window is not None:
        far = positions[:, :, None] - positions[:, None, :] >= window
        near = additive.masked_fill(far[:, None], -1e30)
    layers = {"sliding_attention": near, "full_attention": additive}
    logits = model(
        whole,
        attention_mask=layers if name.startswith("Gemma") else additive,
        position_ids=positions,
        oracle_scores=scores,
        oracle_documents=owner.clamp(min=-1),
        oracle_scored=(place >= length).expand(2, -1),
    ).logits
    expected = target_loss(logits[:, length:], ids, is_target)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_one_document_reads_the_same_jointly_and_independently() -> None:
    g = torch.Generator().manual_seed(4)
    document = _tokens(g, 6).tolist()
    ids, mask, _, _ = _suffix(g)
    model = make_model("Llama")
    with inject_attention(model, HEADS):
        joint = read_jointly(model, torch.tensor([[1, *document]]), torch.tensor([[[1, 7]]]))
        alone = read_independently(model, [document], header=[1])
        a, b = (
            model(ids, attention_mask=mask, document_prefix=p, document_scores=torch.ones(2, 1))
            for p in (joint, alone)
        )
    torch.testing.assert_close(a.logits[1], b.logits[1], rtol=1e-12, atol=1e-12)


def test_the_prefix_is_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator sees the very storage of the prefix, with batch 1, in every layer."""
    from dream_kernels.injection import attention

    g = torch.Generator().manual_seed(5)
    model = make_model("Llama", torch.float32)
    ids, mask, _, scores = _suffix(g)
    seen = []
    original = attention.api.attend

    def spy(*args, **kwargs):
        seen.append(kwargs["prefix"])
        return original(*args, **kwargs)

    monkeypatch.setattr(attention.api, "attend", spy)
    with inject_attention(model, HEADS):
        prefix = read_jointly(model, _tokens(g, 1, 9), torch.tensor([[[0, 3], [3, 6], [6, 9]]]))
        model(ids, attention_mask=mask, document_prefix=prefix, document_scores=scores)
    assert len(seen) == 3
    for (key, value), (own_key, own_value) in zip(seen, prefix.layers, strict=True):
        assert key.shape[0] == 1
        assert key.data_ptr() == own_key.data_ptr() and value.data_ptr() == own_value.data_ptr()


def test_a_prefix_without_scores_reads_plainly() -> None:
    g = torch.Generator().manual_seed(6)
    documents, spans = _tokens(g, 1, 9), torch.tensor([[[0, 3], [3, 6], [6, 9]]])
    ids = _tokens(g, 2, 5)
    model = make_model("Qwen2")
    expected = model(torch.cat([documents.expand(2, -1), ids], 1)).logits[:, 9:]
    with inject_attention(model, HEADS):
        prefix = read_jointly(model, documents, spans)
        logits = model(ids, document_prefix=prefix).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_keeps_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own cache is dropped under checkpointing; the prefix keyword is not.

    Where the documents are is checked once a pass, for all layers and their second forward.
    """
    checked = []
    original = validation._checked_geometry

    def recorded(*arguments):
        checked.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(validation, "_checked_geometry", recorded)
    g = torch.Generator().manual_seed(7)
    model = make_model("Llama")
    ids, mask, is_target, scores = _suffix(g)
    with inject_attention(model, HEADS):
        prefix = read_jointly(model, _tokens(g, 1, 9), torch.tensor([[[0, 3], [3, 6], [6, 9]]]))
        inputs = {"attention_mask": mask, "document_prefix": prefix}
        expected = _loss_and_gradient(model, ids, is_target, scores, **inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        actual = _loss_and_gradient(model, ids, is_target, scores, **inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert len(checked) == 2


def test_bad_prefixes_are_refused() -> None:
    model = make_model("Llama")
    spans = torch.tensor([[[0, 3], [3, 6], [6, 9]]])
    ids = torch.randint(3, VOCABULARY, (2, 5))
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="padding at the end"):
        read_jointly(model, ids, spans[:, :1], torch.tensor([[0, 1, 1, 1, 1]] * 2))
    with pytest.raises(ValueError, match="disjoint"):
        read_jointly(model, ids, torch.tensor([[[0, 3], [2, 4]]] * 2))
    with pytest.raises(ValueError, match="at least one token each"):
        read_independently(model, [[3, 4], []])
    with pytest.raises(ValueError, match=r"documents 0 \.\. 1"):
        read_independently(model, [[3, 4], [5]], pools=[[0, 2]])
    prefix = read_independently(model, [[3, 4], [5], [6]])
    short = Prefix(prefix.layers[:2], prefix.spans, prefix.next_position)
    with inject_attention(model, HEADS):
        with pytest.raises(TypeError, match="must be a Prefix, got tuple"):
            model(ids, document_prefix=(1, 2), document_scores=scores)
        with pytest.raises(ValueError, match=r"3 layers.* got 2"):
            model(ids, document_prefix=short, document_scores=scores)
        pools = read_independently(model, [[3, 4], [5], [6]], pools=[[0], [1], [2]])
        with pytest.raises(ValueError, match="batch 1 or 2, got 3"):
            model(ids, document_prefix=pools, document_scores=scores[:, :1])
