"""What injection does with one architecture, checked against its own attention formula."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from dream_kernels import inject_attention, read_jointly
from dream_kernels.injection import support
from dream_kernels.injection.layers import layers_of
from helpers.decoders import HEADS, make_decoder

# The documents are within the windows of the tiny models, tokens before them are not.
SPANS = torch.tensor([[[8, 10], [10, 14]]])
TOKENS, END = 24, 14


@dataclass(frozen=True)
class Outcome:
    """What the table says of an architecture.

    Attributes:
        name: of the model's class.
        heads: in which layers scores can act, or why in none.
        prefix: "yes", or why documents cannot be read apart.
        refused: whether the model is.
    """

    name: str
    heads: str
    prefix: str = ""
    refused: bool = False


def try_reader(model_type: str) -> Outcome:
    """Check everything that an architecture allows, or that it is refused at injection.

    Raises:
        AssertionError: something is wrong silently, or refused later than at injection.
    """
    model = make_decoder(model_type)
    name, layers = type(model).__name__, layers_of(model)
    reason = support.why_not(model, layers)
    if reason is not None:
        with pytest.raises(ValueError, match=f"{name} cannot be injected: "):
            inject_attention(model, {0: [0]})
        return Outcome(name, reason, refused=True)
    heads = {layer: [0, HEADS - 1] for layer in sorted(layers.attention)}
    for layer, why in layers.refused.items():
        with pytest.raises(ValueError, match=f"layer {layer}, in which scores cannot act"):
            inject_attention(model, {layer: [0]})
        assert why
    ids = torch.randint(3, 60, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    _without_scores(model, heads, ids, mask)
    for mode in ("reweight", "bias"):
        _with_scores(model, heads, ids, mask, mode)
    prefix = support.why_no_prefix(model, layers)
    if prefix is None:
        _with_prefix(model, heads, ids, mask)
    else:
        with pytest.raises(ValueError, match="cannot read documents into a prefix"):
            read_jointly(model, ids[:, :END], SPANS)
    return Outcome(name, _in_words(heads, layers), prefix or "yes")


def _in_words(heads: dict, layers) -> str:
    if not layers.refused:
        return "all heads"
    kinds = sorted({why.removeprefix("its type is ") for why in layers.refused.values()})
    return f"heads in {len(heads)} of {layers.count} layers (others: {', '.join(kinds)})"


def _without_scores(model, heads, ids, mask) -> None:
    before = model(ids, attention_mask=mask).logits
    with inject_attention(model, heads):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def _scores() -> Tensor:
    return torch.tensor([[0.5, 2.0], [1.5, -1.0]], dtype=torch.float64, requires_grad=True)


def _logits_and_gradient(logits: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits[mask.bool()].double()
    g = torch.Generator().manual_seed(2)
    weights = torch.randn(logits.shape, generator=g, dtype=torch.float64)
    loss = (logits.log_softmax(-1) * weights).sum()
    return logits.detach(), torch.autograd.grad(loss, scores)[0]


def _assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        # Norms, rotations and routers of many of them compute in single precision.
        assert (a - b).abs().max() < 2e-5 * b.abs().max(), (a - b).abs().max() / b.abs().max()


def _with_scores(model, heads, ids, mask, mode: str) -> None:
    scores = _scores()
    with inject_attention(model, heads, mode=mode):
        logits = model(
            ids, attention_mask=mask, document_scores=scores, document_spans=SPANS
        ).logits
    actual = _logits_and_gradient(logits, scores, mask)
    scores = _scores()
    with own_formula(model, heads, scores, mode):
        logits = model(ids, attention_mask=mask).logits
    expected = _logits_and_gradient(logits, scores, mask)
    _assert_close(actual, expected)
    plain = model(ids, attention_mask=mask).logits[mask.bool()]
    assert (expected[0] - plain).abs().max() > 1e-3 * plain.abs().max()
    assert expected[1].abs().max() > 1e-6


def _with_prefix(model, heads, ids, mask) -> None:
    with inject_attention(model, heads):
        scores = _scores()
        logits = model(
            ids, attention_mask=mask, document_scores=scores, document_spans=SPANS
        ).logits
        expected = _logits_and_gradient(logits[:, END:], scores, mask[:, END:])
        prefix = read_jointly(model, ids[:, :END], SPANS.expand(2, -1, -1))
        scores = _scores()
        logits = model(
            ids[:, END:],
            attention_mask=mask[:, END:],
            document_scores=scores,
            document_prefix=prefix,
        ).logits
    _assert_close(_logits_and_gradient(logits, scores, mask[:, END:]), expected)


@contextmanager
def own_formula(model, heads: dict, scores: Tensor, mode: str) -> Iterator[None]:
    """Let the model's own eager attention give the probabilities, and change them densely.

    Soft caps, sinks, windows and scales are whatever the architecture makes of them.
    """

    def oracle(module, query, key, value, attention_mask, **kwargs):
        base = sys.modules[type(module).__module__].eager_attention_forward
        with _double_softmax():
            out, plain = base(module, query, key, value, attention_mask, **kwargs)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        read = plain @ value
        if not torch.allclose(out.transpose(1, 2), read, rtol=1e-9, atol=1e-9):
            # Sinks scale what was read instead of the probabilities.
            plain = plain * (out.transpose(1, 2) * read).sum(-1, True) / (read * read).sum(-1, True)
        torch.testing.assert_close(out, (plain @ value).transpose(1, 2), rtol=1e-6, atol=1e-9)
        chosen = heads.get(module.layer_idx, [])
        if not chosen:
            return out, plain
        probabilities = plain.clone()
        probabilities[:, chosen, END:] = _changed(plain[:, chosen, END:], scores, mode)
        return (probabilities @ value).transpose(1, 2).contiguous(), plain

    AttentionInterface.register("oracle", oracle)
    AttentionMaskInterface.register("oracle", eager_mask)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "oracle"
    try:
        yield
    finally:
        config._attn_implementation = before


def _changed(plain: Tensor, scores: Tensor, mode: str) -> Tensor:
    documents = [slice(start, end) for start, end in SPANS[0].tolist()]
    factors = torch.ones_like(plain)
    if mode == "bias":
        for c, document in enumerate(documents):
            factors[..., document] = scores[:, c].exp()[:, None, None, None]
        raised = plain * factors
        rest = 1 - plain.sum(-1, keepdim=True)  # of a sink
        return raised / (raised.sum(-1, keepdim=True) + rest)
    masses = torch.stack([plain[..., document].sum(-1) for document in documents], -1)
    masses = torch.where(masses > 0, masses, 1.0)  # rows of padding may see other padding alone
    share = masses.sum(-1)
    weights = scores.softmax(-1)
    for c, document in enumerate(documents):
        factor = share * weights[:, c, None, None] / masses[..., c]
        factors[..., document] = factor[..., None]
    return plain * factors


@contextmanager
def _double_softmax() -> Iterator[None]:
    """Without the single precision that eager attention computes its softmax in."""
    original = torch.nn.functional.softmax

    def softmax(logits, dim=None, _stacklevel=3, dtype=None):
        return original(logits, dim=dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield
