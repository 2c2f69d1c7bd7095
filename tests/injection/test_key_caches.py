"""Caches of every form: the logits of one pass without a cache, or a refusal."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from dream_kernels import inject_attention, read_jointly
from dream_kernels.injection.support import cache_keyword
from helpers.injected_models import VOCABULARY, make_model

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])
ROWS = 20
# Passes over a cache: all at once; the documents and then token by token; in pieces.
STEPS = ((0, 20), (0, 15, 16, 17, 20), (0, 14, 17, 20))


def _inputs(mask: bool):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, ROWS), generator=g)
    padding = torch.ones_like(ids)
    padding[0, :1] = 0
    scores = 1.5 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    return ids, padding if mask else None, {"document_scores": scores, "document_spans": SPANS}


def _in_steps(model, cache, ids, mask, documents, steps) -> torch.Tensor:
    logits = []
    for begin, end in itertools.pairwise(steps):
        out = model(
            ids[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            use_cache=True,
            **{cache_keyword(model): cache},
            **documents,
        )
        logits.append(out.logits)
    return torch.cat(logits, 1)


def _caches(config):
    return {
        "dynamic": DynamicCache(),
        "dynamic_sliding": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=64),
        "static_full": StaticCache(config=config, max_cache_len=ROWS),
    }


@pytest.mark.parametrize("kind", ("dynamic", "dynamic_sliding", "static", "static_full"))
@pytest.mark.parametrize("masked", (False, True), ids=("plain", "padded"))
@pytest.mark.parametrize("name", ("Llama", "Gemma3"))
@torch.no_grad()
def test_logits_do_not_depend_on_the_cache(name: str, masked: bool, kind: str) -> None:
    ids, mask, documents = _inputs(masked)
    model = make_model(name)
    rows = slice(1 if masked else 0, None)  # the row of padding sees nothing
    with inject_attention(model, HEADS):
        whole = model(ids, attention_mask=mask, **documents).logits
        plain = model(ids, attention_mask=mask).logits
        assert (whole - plain).abs().max() > 1e-3
        for steps in STEPS:
            cache = _caches(model.config)[kind]
            logits = _in_steps(model, cache, ids, mask, documents, steps)
            torch.testing.assert_close(logits[:, rows], whole[:, rows], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_suffix_in_a_static_cache_continues_its_prefix() -> None:
    ids, _, documents = _inputs(False)
    model = make_model("Qwen2")
    with inject_attention(model, HEADS):
        whole = model(ids, **documents).logits[:, 14:]
        prefix = read_jointly(model, ids[:, :14], SPANS.expand(2, -1, -1))
        suffix = {"document_scores": documents["document_scores"], "document_prefix": prefix}
        cache = StaticCache(config=model.config, max_cache_len=32)
        logits = _in_steps(model, cache, ids[:, 14:], None, suffix, (0, 3, 4, 6))
    torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_masses_do_not_depend_on_the_cache() -> None:
    ids, _, _ = _inputs(False)
    rows = torch.zeros(2, ROWS)
    rows[:, 16:] = 0.25
    model = make_model("Llama")
    inputs = {"input_ids": ids, "document_spans": SPANS}
    with inject_attention(model, HEADS) as injection:
        expected = injection.read_mass(rows, **inputs)
        cache = StaticCache(config=model.config, max_cache_len=64)
        actual = injection.read_mass(rows, **inputs, **{cache_keyword(model): cache})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("cache_class", (DynamicCache, StaticCache))
@pytest.mark.parametrize("name", ("Mistral", "Gemma3"))
@torch.no_grad()
def test_keys_that_a_sliding_cache_dropped_are_missed(name: str, cache_class) -> None:
    """The last keys of a window are as many as fit, so that their number alone shows nothing."""
    ids, _, documents = _inputs(False)
    documents["document_spans"] = SPANS // 2
    model = make_model(name, sliding_window=12)
    options = {"max_cache_len": 64} if cache_class is StaticCache else {}
    with inject_attention(model, HEADS):
        for steps in ((0, 11, 12, 13, 14), (0, 8, 15, 16)):
            cache = cache_class(config=model.config, **options)
            with pytest.raises(ValueError, match=r"layer 0 (must see the|attends through a slid)"):
                _in_steps(model, cache, ids, None, documents, steps)
        # As long as nothing was dropped it is exact.
        expected = _in_steps(model, DynamicCache(), ids, None, documents, (0, 11, 12))
        cache = cache_class(config=model.config, **options)
        actual = _in_steps(model, cache, ids, None, documents, (0, 11, 12))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class _Ring(DynamicLayer):
    """Hands out more keys than were written, in an order of its own."""

    def update(self, key, value, *args, **kwargs):
        return tuple(torch.cat([s, s], 2) for s in super().update(key, value, *args, **kwargs))


@torch.no_grad()
def test_unknown_places_in_a_cache_are_refused() -> None:
    ids, _, documents = _inputs(False)
    model = make_model("Llama")
    cache = DynamicCache()
    cache.layers = [_Ring() for _ in range(3)]
    with inject_attention(model, HEADS), pytest.raises(ValueError, match=r"got 40 keys .DynamicC"):
        _in_steps(model, cache, ids, None, documents, (0, ROWS))
