"""Generation with documents equals decoding step by step with them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dream_kernels import inject_attention, read_independently
from helpers.injected_models import VOCABULARY, make_model

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])
NEW = 6


def _inputs(prefixed: bool, model):
    """Prompts, their padding, and the documents that go with them."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 18), generator=g)
    mask = torch.ones_like(ids)
    scores = 4.0 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    if not prefixed:
        mask[0, 0] = 0
        return ids, mask, {"document_scores": scores, "document_spans": SPANS}
    texts = [ids[0, :4].tolist(), ids[0, 4:9].tolist(), ids[1, :3].tolist(), ids[1, 3:9].tolist()]
    prefix = read_independently(model, texts, pools=[[0, 1, 2], [3, 2, 1]], header=[1])
    mask[1, 12:14] = 0
    return ids[:, 12:], mask[:, 12:], {"document_scores": scores, "document_prefix": prefix}


@torch.no_grad()
def _greedily(model, ids, mask, documents) -> torch.Tensor:
    """The whole sequence in every step, without a cache."""
    for _ in range(NEW):
        logits = model(ids, attention_mask=mask, use_cache=False, **documents).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    return ids


def _options(mask, **options):
    eos = {"eos_token_id": None, "pad_token_id": 0}
    return {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **eos, **options}


@pytest.mark.parametrize("prefixed", (False, True), ids=("spans", "prefix"))
@pytest.mark.parametrize("name", ("Llama", "Gemma3"))
def test_greedy_generation_equals_decoding_by_hand(name: str, prefixed: bool) -> None:
    model = make_model(name)
    with inject_attention(model, HEADS) as injection:
        ids, mask, documents = _inputs(prefixed, model)
        expected = _greedily(model, ids, mask, documents)
        for cached in (True, False):
            options = _options(mask, use_cache=cached)
            assert torch.equal(injection.generate(ids, **documents, **options), expected)
        plain = injection.generate(ids, **_options(mask))
        assert torch.equal(plain, model.generate(ids, **_options(mask)))
        assert not torch.equal(plain, expected)
        # Rows that attend plainly are those of the prompt.
        documents["document_first_row"] = ids.shape[1]
        late = injection.generate(ids, **documents, **_options(mask))
        del documents["document_first_row"]
        by_hand = _greedily(model, ids, mask, {**documents, "document_first_row": ids.shape[1]})
        assert torch.equal(late, by_hand)


@pytest.mark.parametrize("prefixed", (False, True), ids=("spans", "prefix"))
@torch.no_grad()
def test_beams_and_samples_share_the_documents_of_their_prompt(prefixed: bool) -> None:
    model = make_model("Llama")
    with inject_attention(model, HEADS) as injection:
        ids, mask, documents = _inputs(prefixed, model)
        options = _options(mask, num_beams=3, num_return_sequences=3, length_penalty=0.0)
        found = injection.generate(
            ids, **documents, **options, output_scores=True, return_dict_in_generate=True
        )
        assert found.sequences.shape == (6, ids.shape[1] + NEW)
        # What a beam is worth is the log-probability of its tokens in one pass with its documents.
        for b in range(2):
            own = {**documents, "document_scores": documents["document_scores"][b : b + 1]}
            if prefixed:
                own["document_prefix"] = documents["document_prefix"].of_rows(torch.tensor([b]))
            for i in range(3 * b, 3 * b + 3):
                whole = found.sequences[i : i + 1]
                own_mask = torch.cat([mask[b : b + 1], mask.new_ones(1, NEW)], 1)
                logits = model(whole, attention_mask=own_mask, **own).logits[:, -NEW - 1 : -1]
                steps = logits.log_softmax(-1).gather(-1, whole[:, -NEW:, None])
                value = found.sequences_scores[i].double()
                torch.testing.assert_close(steps.sum(), value, rtol=1e-5, atol=1e-4)
        torch.manual_seed(3)
        options = _options(mask, do_sample=True, num_return_sequences=2)
        samples = injection.generate(ids, **documents, **options)
        assert samples.shape == (4, ids.shape[1] + NEW)


def test_generation_in_several_threads_and_a_call_in_between() -> None:
    model = make_model("Llama")
    meet = threading.Barrier(3)
    with inject_attention(model, HEADS) as injection:
        ids, mask, documents = _inputs(False, model)
        own = [{**documents, "document_scores": documents["document_scores"] * s} for s in (1, -1)]
        expected = [injection.generate(ids, **d, **_options(mask)) for d in own]
        expected.append(injection.generate(ids, **_options(mask)))
        assert not torch.equal(expected[0], expected[1])

        def generate(documents) -> torch.Tensor:
            meet.wait()
            return injection.generate(ids, **documents, **_options(mask))

        with ThreadPoolExecutor(3) as pool:
            actual = list(pool.map(generate, [*own, {}]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_what_cannot_be_is_said_and_leaves_nothing_behind() -> None:
    model = make_model("Llama")
    with inject_attention(model, HEADS) as injection:
        ids, mask, documents = _inputs(False, model)
        plain = model.generate(ids, **_options(mask))
        for option, value in (
            ("assistant_model", model),
            ("prompt_lookup_num_tokens", 2),
            ("guidance_scale", 1.5),
            ("position_ids", torch.zeros_like(ids)),
        ):
            message = f"^{option} is not supported in generation with documents$"
            with pytest.raises(ValueError, match=message):
                injection.generate(ids, **documents, **_options(mask, **{option: value}))
        with pytest.raises(ValueError, match=r"cache_implementation must be 'dynamic' .* 'static'"):
            injection.generate(ids, **documents, **_options(mask, cache_implementation="static"))
        with pytest.raises(ValueError, match="spans must satisfy"):
            injection.generate(ids, **{**documents, "document_spans": SPANS + 9}, **_options(mask))
        with pytest.raises(ValueError, match=r"document_first_row must lie in 0 \.\. 18, got 19"):
            injection.generate(ids, **documents, document_first_row=19, **_options(mask))
        with pytest.raises(ValueError, match="document_scores needs document_spans"):
            injection.generate(ids, document_scores=documents["document_scores"], **_options(mask))
        assert torch.equal(model.generate(ids, **_options(mask)), plain)
