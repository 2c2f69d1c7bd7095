"""Models and masks that the operator would get wrong: refused with the reason, not computed.

Older transformers does does not use the attention of some of these models at all.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from dream_kernels import inject_attention, read_jointly
from dream_kernels.injection import support
from helpers.decoders import make_decoder

SPANS = torch.tensor([[[1, 4], [4, 7]]])
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "is_decoder": True,
}


def _make(name: str, **changes):
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **changes})
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'Bert' else 'ForCausalLM'}")
    return model(config).eval().requires_grad_(False)


def _call(model, **inputs):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 12), generator=g)
    inputs = {"document_scores": torch.tensor([[0.0, 3.0]] * 2), "document_spans": SPANS, **inputs}
    return model(ids, **inputs).logits


@pytest.mark.parametrize("name", ("StableLm", "Nemotron"))
def test_layers_that_drop_keywords_are_found_at_injection(name: str) -> None:
    message = f"({name}DecoderLayer does not pass keyword arguments on, by which|does not use)"
    with pytest.raises(ValueError, match=message):
        inject_attention(_make(name), {0: [0]})


def test_what_drops_keywords_is_read_from_the_source() -> None:
    class Takes:
        def forward(self, x, **kwargs):
            return self.inner(x, **kwargs)

    class DropsAll:
        def forward(self, x, **kwargs):
            return self.inner(x)

    class TakesNone:
        def forward(self, x):
            return self.inner(x)

    class UsesThemElsewhere:
        def forward(self, x, **kwargs):
            x = _make(self.inner(x), **kwargs)
            return self.loss_function(x, **kwargs)

    kinds = (Takes, DropsAll, TakesNone, UsesThemElsewhere)
    assert [support._passes_keywords(kind.forward) for kind in kinds] == [True] + [False] * 3
    # Without a source the call itself finds out.
    namespace: dict = {}
    exec("def forward(self, **kwargs): pass", namespace)
    assert support._passes_keywords(namespace["forward"])


def test_attention_that_is_not_causal() -> None:
    with pytest.raises(ValueError, match=r"BertSelfAttention is not causal|does not use"):
        inject_attention(_make("Bert", is_decoder=False), {0: [0]})


@pytest.mark.parametrize(
    "name,reason",
    [
        ("Doge", "DogeAttention computes a mask of its own"),
        ("DiffLlama", "DiffLlamaAttention attends more than once"),
        ("Inkling", "InklingAttention gives its attention position_bias"),
        ("Dory", "DoryAttention is used more than once in a pass"),
    ],
)
def test_what_an_attention_does_besides_is_read_from_the_source(name: str, reason: str) -> None:
    """Doge adds what it computes from the values to its mask."""
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=f"not one of its layers can be: .*{reason}|does not use"):
        inject_attention(make_decoder(name.lower() + "_text" * (name == "Inkling")), {1: [0]})


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_masks_that_show_later_tokens(attention: str, monkeypatch) -> None:
    model = _make("Llama")
    model.config._attn_implementation = attention
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, :2] = 0
    padding[1, -2:] = 0
    with inject_attention(model, {1: [0]}):
        expected = _call(model, attention_mask=padding)
        assert torch.isfinite(expected).all()
        layer, seen = model.model.layers[1].self_attn, []
        forward = layer.forward

        def other(*args, attention_mask, **kwargs):
            seen.append(attention_mask)
            mask = attention_mask.clone()
            mask[1, 0, 5, 6] = True if mask.dtype == torch.bool else 0.0
            return forward(*args, attention_mask=mask, **kwargs)

        layer.forward = other
        with pytest.raises(ValueError, match="layer 1 attends with a mask that is not causal att"):
            _call(model, attention_mask=padding)
    assert seen[0].dim() == 4


def test_positions_that_cannot_be_told() -> None:
    model = _make("Roberta")
    assert not support.takes_positions(model) and support.takes_positions(_make("Llama"))
    if not type(model)._can_set_attn_implementation():
        return
    ids = torch.arange(3, 11)[None]
    prefix = read_jointly(_make("Llama"), ids, SPANS)
    with inject_attention(model, {1: [0]}):
        _call(model)
        with pytest.raises(
            ValueError, match="cannot read documents into a prefix: it does not take"
        ):
            read_jointly(model, ids, SPANS)
        with pytest.raises(
            ValueError, match="document_prefix does not go with this model: it does not take"
        ):
            _call(model, document_spans=None, document_prefix=prefix)


def test_states_of_an_encoder() -> None:
    with inject_attention(model := _make("Llama"), {1: [0]}):
        with pytest.raises(ValueError, match="encoder_hidden_states is not supported with doc"):
            _call(model, encoder_hidden_states=torch.zeros(2, 12, 32))
