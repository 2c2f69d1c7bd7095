"""Models in wrappers, compiled and checkpointed: what the plain decoder gives."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from dream_kernels import inject_attention, read_independently, read_jointly
from helpers.injected_models import VOCABULARY, make_model

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])


def _inputs():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    scores = 1.5 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    return ids, mask, scores.requires_grad_()


def _run(model, **changes):
    """Logits and the gradient of the scores, through the loss of the model itself."""
    ids, mask, scores = _inputs()
    documents = {"document_scores": scores, "document_spans": SPANS, **changes}
    out = model(input_ids=ids, attention_mask=mask, labels=ids, **documents)
    return out.logits.detach(), torch.autograd.grad(out.loss, scores)[0]


def _with_lora():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("Llama"), config).eval().double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model


def test_a_peft_model_takes_documents_as_its_decoder_does() -> None:
    model = _with_lora()
    merged = copy.deepcopy(model).merge_and_unload()
    with inject_attention(merged, HEADS):
        expected = _run(merged)
    ids, mask, _ = _inputs()
    before = model(input_ids=ids, attention_mask=mask).logits
    with inject_attention(model, HEADS) as injection:
        assert injection.model is model.get_base_model()
        for wrapped in (model, model.base_model, model.get_base_model()):
            torch.testing.assert_close(_run(wrapped), expected, rtol=1e-9, atol=1e-11)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        logits = model(ids, mask, document_scores=_inputs()[2], document_spans=SPANS).logits
        torch.testing.assert_close(logits, expected[0], rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="injected already"), inject_attention(model, HEADS):
        inject_attention(model.get_base_model(), HEADS)


@torch.no_grad()
def test_documents_are_read_through_wrappers() -> None:
    model = _with_lora()
    ids, _, scores = _inputs()
    with inject_attention(model, HEADS):
        whole = model(ids, document_scores=scores, document_spans=SPANS).logits[:, 14:]
        for wrapped in (model, torch.compile(model), model.get_base_model()):
            prefix = read_jointly(wrapped, ids[:, :14], SPANS.expand(2, -1, -1))
            logits = model(ids[:, 14:], document_scores=scores, document_prefix=prefix).logits
            torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-9)
            alone = read_independently(wrapped, [ids[0, :14].tolist()]).layers
            own, expected = alone[2][0][0], prefix.layers[2][0][0]
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_adapters_that_add_tokens_are_refused() -> None:
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(
            make_model("Llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        with pytest.raises(ValueError, match="_TUNING adds tokens, which document_spans would"):
            inject_attention(model, HEADS)


@pytest.mark.parametrize("order", ("wrapped_before", "wrapped_after", "in_place_before"))
def test_compiled_models_give_what_the_plain_one_gives(order: str) -> None:
    torch._dynamo.reset()
    model = make_model("Llama", num_hidden_layers=1)
    heads, ids, mask = {0: [1, 4]}, *_inputs()[:2]
    plain = model(ids, attention_mask=mask).logits
    with inject_attention(model, heads):
        expected = _run(model)
    assert expected[1].abs().max() > 1e-4
    options = {"backend": "aot_eager", "fullgraph": True}
    compiled = model
    if order == "wrapped_before":
        compiled = torch.compile(model, **options)
    elif order == "in_place_before":
        model.compile(**options)
    if order != "wrapped_after":
        torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, plain)
    with inject_attention(compiled, heads) as injection:
        assert injection.model is model
        if order == "wrapped_after":
            compiled = torch.compile(model, **options)
        torch.testing.assert_close(_run(compiled), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, plain)
        # A graph is made for its heads.
        injection.use_heads({0: [2]})
        assert (_run(compiled)[0] - expected[0]).abs().max() > 1e-3
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, plain)


def test_a_compiled_model_reads_a_prefix() -> None:
    ids, _, scores = _inputs()
    model = make_model("Qwen2", num_hidden_layers=1)
    with inject_attention(model, {0: [1, 4]}):
        whole = model(ids, document_scores=scores, document_spans=SPANS).logits[:, 14:]
        prefix = read_jointly(model, ids[:, :14], SPANS.expand(2, -1, -1))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        logits = compiled(ids[:, 14:], document_scores=scores, document_prefix=prefix).logits
    torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("with_prefix", (False, True))
def test_checkpointing_in_training_mode_gives_the_same_gradient(with_prefix, reentrant) -> None:
    """Recomputed layers see the documents of their call, though another came in between."""
    ids, mask, scores = _inputs()
    model = make_model("Llama")
    with inject_attention(model, HEADS):
        inputs = {"input_ids": ids, "attention_mask": mask, "document_spans": SPANS}
        if with_prefix:
            prefix = read_jointly(model, ids[:, :14], SPANS.expand(2, -1, -1))
            inputs = {"input_ids": ids[:, 14:], "document_prefix": prefix}
        inputs["labels"] = inputs["input_ids"]

        def gradient() -> torch.Tensor:
            own = scores.detach().requires_grad_()
            loss = model(document_scores=own, **inputs).loss
            with torch.no_grad():
                model(document_scores=own.flip(1), **inputs)
            loss.backward()
            return own.grad

        expected = gradient()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # without it, reentrant checkpointing has no gradient
        model.train()
        torch.testing.assert_close(gradient(), expected, rtol=1e-12, atol=1e-15)
    assert expected.abs().max() > 1e-4
