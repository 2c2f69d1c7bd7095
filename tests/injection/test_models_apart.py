"""An injection touches its own model alone: configs that models share, copies, saved models."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers

from dream_kernels import inject_attention
from helpers.injected_models import VOCABULARY, make_model

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])


def _inputs():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=g)
    scores = 1.5 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    return ids, {"document_scores": scores, "document_spans": SPANS}


def _twin(model):
    """Another model of the same config object."""
    return type(model)(model.config).to(torch.float64).eval()


def _configs(model) -> list[int]:
    """The identities of the configs that the modules of a model read."""
    return [id(module.config) for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("name", ("Llama", "Gemma3"))
@torch.no_grad()
def test_models_of_one_config_do_not_touch_each_other(name: str) -> None:
    first = make_model(name)
    second, config = _twin(first), first.config
    before = [_configs(first), _configs(second)]
    ids, documents = _inputs()
    alone = []
    for model in (first, second):
        with inject_attention(model, HEADS):
            alone.append(model(ids, **documents).logits)
    plain = second(ids).logits
    assert config._attn_implementation == "sdpa" and first.config is config is second.config

    first_injection = inject_attention(first, HEADS)
    assert config._attn_implementation == second.config._attn_implementation == "sdpa"
    assert torch.equal(second(ids).logits, plain)
    second_injection = inject_attention(second, HEADS)
    for model, expected in zip((first, second), alone, strict=True):
        assert torch.equal(model(ids, **documents).logits, expected)
    first_injection.remove()
    assert torch.equal(second(ids, **documents).logits, alone[1])
    second_injection.remove()
    assert [_configs(first), _configs(second)] == before
    assert config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_model_made_from_an_injected_config_is_injected_on_its_own() -> None:
    first = make_model("Llama")
    ids, documents = _inputs()
    injection = inject_attention(first, HEADS)
    second = _twin(first)
    with inject_attention(second, HEADS):
        during = second(ids, **documents).logits
    injection.remove()
    assert second.config._attn_implementation == "sdpa"
    with inject_attention(second, HEADS):
        assert torch.equal(second(ids, **documents).logits, during)
    assert second.config._attn_implementation == "sdpa"


def test_a_part_of_a_composite_config_is_switched_alone() -> None:
    """Gemma 3 with images: the language model's attention is another one's than the vision's."""
    text = make_model("Gemma3").config.to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    config._attn_implementation = "sdpa"
    model = transformers.Gemma3ForConditionalGeneration(config).to(torch.float64).eval()
    ids, documents = _inputs()
    kinds = torch.zeros_like(ids)
    with torch.no_grad():
        plain = model(ids, token_type_ids=kinds).logits
        with inject_attention(model, HEADS):
            assert model.config.get_text_config()._attn_implementation != "sdpa"
            assert model.config.vision_config._attn_implementation == "sdpa"
            assert config.get_text_config()._attn_implementation == "sdpa"
            assert torch.equal(model(ids, token_type_ids=kinds).logits, plain)
            assert not torch.equal(model(ids, token_type_ids=kinds, **documents).logits, plain)
        assert torch.equal(model(ids, token_type_ids=kinds).logits, plain)
    assert model.config is config


def test_what_is_set_in_the_config_meanwhile_stays() -> None:
    model = make_model("Llama")
    config = model.config
    injection = inject_attention(model, HEADS)
    model.config.use_cache = False
    model.config.of_a_user = [1]
    config.pad_token_id = 5
    injection.remove()
    assert model.config is config
    assert (config.use_cache, config.of_a_user, config.pad_token_id) == (False, [1], 5)


@torch.no_grad()
def test_a_copy_of_an_injected_model_is_injected_itself() -> None:
    model = make_model("Llama")
    ids, documents = _inputs()
    injection = inject_attention(model, HEADS)
    expected = model(ids, **documents).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(ids, **documents).logits, expected)
    other.lm_head.weight.zero_()
    assert torch.equal(model(ids, **documents).logits, expected)
    injection.remove()
    assert other(ids, **documents).logits.abs().max() == 0, "still injected, and its own weights"
    with pytest.raises(ValueError, match="injected already"):
        inject_attention(other, HEADS)


@torch.no_grad()
def test_saving_and_loading_while_injected(tmp_path) -> None:
    model = make_model("Llama")
    ids, documents = _inputs()
    plain = model(ids).logits
    with inject_attention(model, HEADS):
        expected = model(ids, **documents).logits
        model.save_pretrained(tmp_path / "folder")
        torch.save(model, file := io.BytesIO())
    assert "dream" not in (tmp_path / "folder" / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path / "folder", dtype=torch.float64)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids).logits, plain)
    with inject_attention(loaded, HEADS):
        assert torch.equal(loaded(ids, **documents).logits, expected)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    assert torch.equal(pickled(ids, **documents).logits, expected)
