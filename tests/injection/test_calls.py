"""What belongs to one call of an injected model stays with that call."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dream_kernels import inject_attention, read_jointly
from helpers.injected_models import VOCABULARY, make_model

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])
ROWS = 20


def _inputs(seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, ROWS), generator=g)
    scores = 1.5 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    return ids, scores.requires_grad_()


def test_threads_that_share_a_model_see_their_own_documents() -> None:
    """Calls of every kind at once: with other scores, without any, masses, hidden states."""
    model = make_model("Llama")
    rows = torch.zeros(2, ROWS)
    rows[:, 16:] = 0.25
    meet = threading.Barrier(4)

    def with_scores(seed: int, injection) -> torch.Tensor:
        ids, scores = _inputs(seed)
        out = model(ids, labels=ids, document_scores=scores, document_spans=SPANS)
        return torch.autograd.grad(out.loss, scores)[0]

    def plainly(seed: int, injection) -> torch.Tensor:
        return model(_inputs(seed)[0]).logits

    def mass(seed: int, injection) -> torch.Tensor:
        spans = SPANS - seed % 2
        return injection.read_mass(rows, input_ids=_inputs(seed)[0], document_spans=spans)

    def decode(seed: int, injection) -> torch.Tensor:
        ids, scores = _inputs(seed)
        prefix = read_jointly(model, ids[:, :14], SPANS.expand(2, -1, -1))
        return injection.decode(
            input_ids=ids[:, 14:], document_scores=scores, document_prefix=prefix
        )

    def wrongly(seed: int, injection) -> torch.Tensor:
        with pytest.raises(ValueError, match="must satisfy"):
            model(_inputs(seed)[0], document_scores=_inputs(seed)[1], document_spans=SPANS + 9)
        return torch.zeros(())

    kinds = (with_scores, plainly, mass, decode, wrongly)

    def repeat(thread: int, injection) -> list[torch.Tensor]:
        meet.wait()
        return [kinds[(thread + i) % len(kinds)](thread + i, injection).detach() for i in range(25)]

    with inject_attention(model, HEADS) as injection:
        expected = [
            [kinds[(t + i) % len(kinds)](t + i, injection).detach() for i in range(25)]
            for t in range(4)
        ]
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(repeat, range(4), [injection] * 4))
    for own, wanted in zip(actual, expected, strict=True):
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_finished_call_leaves_nothing_behind() -> None:
    model = make_model("Llama")
    ids, scores = _inputs()
    alive = weakref.ref(scores)
    with inject_attention(model, HEADS) as injection:
        before = dict(vars(injection))
        model(ids, document_scores=scores, document_spans=SPANS)
        with pytest.raises(ValueError, match="must satisfy"):
            model(ids, document_scores=scores, document_spans=SPANS + 9)
        with pytest.raises(ValueError, match="must satisfy"):
            injection.read_mass(torch.ones(2, ROWS), input_ids=ids, document_spans=SPANS + 9)
        plain = model(ids).logits
        assert vars(injection) == before
        del scores
        gc.collect()
        assert alive() is None
    assert torch.equal(plain, model(ids).logits)


def test_layers_that_were_missed_are_found_in_the_call_that_missed_them() -> None:
    model = make_model("Llama")
    ids, scores = _inputs()
    documents = {"document_scores": scores, "document_spans": SPANS}
    with inject_attention(model, HEADS):
        expected = model(ids, **documents).logits
        attention = model.model.layers[1].self_attn
        forward = attention.forward
        attention.forward = lambda *args, document_context=None, **kwargs: forward(*args, **kwargs)
        model(ids)
        message = r"did not reach the attention of layers \[1\]: LlamaForCausalLM does not pass"
        with pytest.raises(RuntimeError, match=message):
            model(ids, **documents)
        attention.forward = forward
        assert torch.equal(model(ids, **documents).logits, expected)


def test_calls_that_pass_the_injection_by_are_refused() -> None:
    model = make_model("Llama")
    ids, scores = _inputs()
    documents = {"document_scores": scores, "document_spans": SPANS}
    with inject_attention(model, HEADS):
        for function in (model.forward, model.model):
            with pytest.raises(RuntimeError, match="reached the attention without the injected"):
                function(ids, **documents)


def test_models_without_values_give_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    model, elsewhere = make_model("Llama"), make_model("Llama").to("meta")
    ids, scores = _inputs()
    try:
        elsewhere(ids.to("meta"))
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot run on meta tensors itself: {error}")
    with inject_attention(elsewhere, HEADS):
        logits = elsewhere(
            ids.to("meta"), document_scores=scores.to("meta"), document_spans=SPANS.to("meta")
        ).logits
    assert logits.is_meta and logits.shape == (2, ROWS, VOCABULARY)
    with inject_attention(model, HEADS), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in (ids, scores, SPANS)]
        out = model(fakes[0], document_scores=fakes[1], document_spans=fakes[2])
    assert isinstance(out.logits, FakeTensor) and out.logits.shape == (2, ROWS, VOCABULARY)
