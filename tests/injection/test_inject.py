"""Injection into every supported model class: exact with scores, invisible without."""

from __future__ import annotations

import pytest
import torch

from dream_kernels import (
    HeadFile,
    inject_attention,
    read_independently,
    read_jointly,
    write_heads,
)
from dream_kernels.injection import WindowError
from dream_kernels.injection.support import cache_keyword
from helpers.injected_models import NAMES, VOCABULARY, make_model, register_oracle, target_loss

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
SPANS = torch.tensor([[[2, 6], [6, 10], [11, 14]]])
ROWS = 20

every_model = pytest.mark.parametrize("name", NAMES)


def _inputs(batch: int = 2, padding: str | None = None):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, ROWS), generator=g)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :1] = 0
    elif padding == "right":
        mask[1, -3:] = 0
    elif padding == "document":
        mask[1, 6:10] = 0
    scores = 1.5 * torch.randn(batch, 3, generator=g, dtype=torch.float64)
    return ids, mask, scores.requires_grad_()


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@every_model
def test_without_scores_nothing_changes(name: str, attention: str) -> None:
    model = make_model(name, torch.float32, attention)
    ids, mask, _ = _inputs(padding="left")
    before = model(ids, attention_mask=mask).logits
    injection = inject_attention(model, HEADS)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    injection.remove()
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert model.config._attn_implementation == attention
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize(
    "padding,mode,mass,per_head",
    [
        (None, "reweight", None, False),
        ("left", "reweight", None, True),
        ("right", "reweight", 0.7, False),
        ("document", "reweight", None, False),
        ("left", "bias", None, False),
    ],
)
@every_model
def test_scores_act_as_defined(name, padding, mode, mass, per_head) -> None:
    """Loss and gradient equal a loop over rows and documents under plain autograd."""
    ids, mask, scores = _inputs(padding=padding)
    if per_head:
        scores = torch.randn(2, 6, 3, dtype=torch.float64).requires_grad_()
    is_target = mask.bool() & (torch.arange(ROWS) >= 17)

    model = make_model(name)
    with inject_attention(model, HEADS, mode=mode, document_mass=mass):
        logits = model(
            ids, attention_mask=mask, document_scores=scores, document_spans=SPANS
        ).logits
    loss = target_loss(logits, ids, is_target)
    (gradient,) = torch.autograd.grad(loss, scores)

    documents = torch.full((2, ROWS), -1)
    for c, (start, end) in enumerate(SPANS[0].tolist()):
        documents[:, start:end] = c
    documents[mask == 0] = -1
    model.config._attn_implementation = register_oracle(HEADS, mode, mass)
    expected_logits = model(
        ids,
        attention_mask=mask,
        oracle_scores=scores,
        oracle_documents=documents,
        oracle_scored=(torch.arange(ROWS) >= 14).expand(2, -1),
    ).logits
    expected = target_loss(expected_logits, ids, is_target)
    (expected_gradient,) = torch.autograd.grad(expected, scores)

    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@every_model
def test_scores_of_every_layer_act_in_their_own_layer(name: str) -> None:
    """Equal scores act as one; the gradient of one score is the sum of those of all its heads."""
    ids, mask, scores = _inputs(padding="left")
    model = make_model(name)
    with inject_attention(model, HEADS):

        def loss_and_gradient(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = model(
                ids, attention_mask=mask, labels=ids, document_scores=own, document_spans=SPANS
            )
            return out.loss, torch.autograd.grad(out.loss, own)[0]

        expected, expected_gradient = loss_and_gradient(scores)
        everywhere = scores.detach()[:, None, None].repeat(1, 3, 6, 1).requires_grad_()
        loss, gradient = loss_and_gradient(everywhere)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient.sum((1, 2)), expected_gradient, rtol=1e-9, atol=1e-12)
        injected = torch.zeros(3, 6, dtype=torch.bool)
        for layer, heads in HEADS.items():
            injected[layer, heads] = True
        assert (gradient[:, injected].abs().amax(-1) > 1e-9).all()
        assert (gradient[:, ~injected] == 0).all()
        # Scores of a layer without such heads change nothing, those of its own layer do.
        changed = everywhere.detach().clone()
        changed[:, :, [2, 5]] += torch.tensor([3.0, 0.0, -3.0])  # read by head 5 of layer 1 alone
        changed[:, 2, 2] = everywhere[:, 2, 2]
        only = everywhere.detach().clone()
        only[:, 1, 5] += torch.tensor([3.0, 0.0, -3.0])
        losses = [loss_and_gradient(own.requires_grad_())[0] for own in (changed, only)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        assert (losses[0] - expected).abs() > 1e-6


def test_gradient_reaches_through_the_models_labels_loss() -> None:
    model = make_model("Llama", torch.float32)
    ids, mask, scores = _inputs()
    with inject_attention(model, HEADS):
        out = model(
            ids, attention_mask=mask, labels=ids, document_scores=scores, document_spans=SPANS
        )
        out.loss.backward()
    assert scores.grad.abs().max() > 0
    # Only differences between scores matter, so the gradient of each row sums to zero.
    assert scores.grad.sum(1).abs().max() < 1e-6


def test_scores_come_from_anywhere_and_the_reader_stays_frozen() -> None:
    model = make_model("Llama", torch.float32)
    ids, _, _ = _inputs()
    encoder = torch.nn.Linear(4, 3)
    with inject_attention(model, HEADS):
        out = model(
            ids, labels=ids, document_scores=encoder(torch.randn(2, 4)), document_spans=SPANS
        )
        out.loss.backward()
    assert encoder.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


@every_model
def test_generate_still_works(name: str) -> None:
    model = make_model(name, torch.float32)
    ids, mask, _ = _inputs(padding="left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, **options)
    with inject_attention(model, HEADS):
        assert torch.equal(model.generate(ids, **options), before)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("oldest_keyword", (True, False))
@every_model
def test_decoding_step_by_step_with_scores_equals_one_pass(name: str, oldest_keyword) -> None:
    model = make_model(name)
    keyword = "past_key_values" if oldest_keyword else cache_keyword(model)
    ids, mask, scores = _inputs()
    documents = {"document_scores": scores, "document_spans": SPANS}
    with torch.no_grad(), inject_attention(model, HEADS):
        whole = model(ids, attention_mask=mask, **documents).logits
        out = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True, **documents)
        for step in range(15, ROWS):
            out = model(
                ids[:, step : step + 1],
                attention_mask=mask[:, : step + 1],
                use_cache=True,
                **{keyword: out.past_key_values},
                **documents,
            )
    torch.testing.assert_close(out.logits[:, -1], whole[:, -1], rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    model = make_model("Llama")
    ids, mask, scores = _inputs()

    def gradient() -> torch.Tensor:
        out = model(
            ids, attention_mask=mask, labels=ids, document_scores=scores, document_spans=SPANS
        )
        return torch.autograd.grad(out.loss, scores)[0]

    with inject_attention(model, HEADS):
        expected = gradient()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.testing.assert_close(gradient(), expected, rtol=1e-12, atol=1e-15)


def test_a_head_file_names_the_heads(tmp_path) -> None:
    path = write_heads(tmp_path / "heads.yaml", HeadFile([(2, 4), (1, 3), (1, 0)]))
    model = make_model("Llama", torch.float32)
    for heads in (path, str(path), HeadFile([(2, 4), (1, 3), (1, 0)])):
        with inject_attention(model, heads) as injection:
            assert injection.heads == {1: [0, 3], 2: [4]}


def test_only_the_chosen_heads_of_a_ranking_receive_scores(tmp_path) -> None:
    heads = [(layer, head) for layer in range(3) for head in range(6)]
    ranking = HeadFile(heads, {head: 5.0 - i for i, head in enumerate(heads)})
    model = make_model("Llama", torch.float32)
    for name in ("heads.yaml", "heads.json"):
        path = write_heads(tmp_path / name, ranking.choose(2))
        with inject_attention(model, path) as injection:
            assert injection.heads == {0: [0, 1]}
        with inject_attention(model, path, top_k=7) as injection:
            assert injection.heads == {0: [0, 1, 2, 3, 4, 5], 1: [0]}
            injection.use_heads(path)
            assert injection.heads == {0: [0, 1]}
        write_heads(path, ranking)
        with pytest.raises(ValueError, match=f"{name}: the heads are a ranking of 18"):
            inject_attention(model, path)
    with pytest.raises(ValueError, match="top_k is for head files, got 1 and a dict"):
        inject_attention(model, HEADS, top_k=1)


def test_a_second_injection_is_refused_and_removal_allows_the_next() -> None:
    model = make_model("Llama", torch.float32)
    first = inject_attention(model, HEADS)
    with pytest.raises(ValueError, match="injected already"):
        inject_attention(model, HEADS)
    first.remove()
    first.remove()
    inject_attention(model, {0: [0]}).remove()


def test_an_error_inside_the_with_statement_restores_the_model() -> None:
    model = make_model("Llama", torch.float32)
    with pytest.raises(RuntimeError, match="boom"), inject_attention(model, HEADS):
        raise RuntimeError("boom")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "heads, error, message",
    [
        ({3: [0]}, ValueError, r"layer 3, and the model has layers 0 \.\. 2"),
        ({0: [6]}, ValueError, r"head 6 of layer 0, and the model has heads 0 \.\. 5"),
        ({0: [-1]}, ValueError, "head -1"),
        ({0: [1, 1]}, ValueError, "twice"),
        ({"0": [1]}, TypeError, "got layer '0'"),
        ({0: ["1"]}, TypeError, "must be integers, got '1'"),
        ([(0, 1)], TypeError, "heads must be .* got list"),
    ],
)
def test_heads_that_the_model_does_not_have(heads, error, message) -> None:
    model = make_model("Llama", torch.float32)
    with pytest.raises(error, match=message):
        inject_attention(model, heads)
    assert model.config._attn_implementation == "sdpa"


def test_other_heads_of_an_injected_model_act_as_if_it_had_been_injected_with_them() -> None:
    model = make_model("Llama")
    ids, _, scores = _inputs()
    documents = {"document_scores": scores, "document_spans": SPANS}
    with inject_attention(model, HEADS):
        expected = model(ids, **documents).logits
    with inject_attention(model, {1: [2]}) as injection:
        assert not torch.equal(model(ids, **documents).logits, expected)
        injection.use_heads(HEADS)
        assert torch.equal(model(ids, **documents).logits, expected)
        with pytest.raises(ValueError, match="layer 3"):
            injection.use_heads({3: [0]})
        assert injection.heads == HEADS


def test_a_head_file_for_a_larger_model_is_refused(tmp_path) -> None:
    path = write_heads(tmp_path / "heads.yaml", HeadFile([(17, 3)]))
    with pytest.raises(ValueError, match="layer 17"):
        inject_attention(make_model("Llama"), path)


def test_models_that_cannot_be_exact_are_refused_with_the_reason() -> None:
    import transformers

    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="encoder-decoder"):
        inject_attention(t5, {})
    with pytest.raises(TypeError, match=r"PreTrainedModel, or one in .* got Linear"):
        inject_attention(torch.nn.Linear(2, 2), HEADS)


def test_a_window_that_cuts_a_scored_row_off_from_documents_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("DREAM_KERNELS_CHECK", "0")  # as on an accelerator
    ids, _, scores = _inputs()
    documents = {"document_scores": scores, "document_spans": SPANS}
    model = make_model("Mistral", sliding_window=12)
    with inject_attention(model, HEADS):
        model(ids)
        with pytest.raises(
            WindowError,
            match=r"layer 0 .* sliding window of 12 tokens, and row 19 is 17 tokens after",
        ):
            model(ids, **documents)
        # Without scores nothing is cut off, and documents that are near enough are seen in full.
        near = torch.tensor([[[8, 10], [10, 12]]])
        model(ids, document_scores=scores[:, :2], document_spans=near)
    # Gemma 3 attends fully in its last layer here: heads there are exact under any window.
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    model = make_model("Gemma3", sliding_window=12, layer_types=layer_types)
    with inject_attention(model, {2: [0, 1]}):
        model(ids, **documents)
    with inject_attention(model, {1: [0]}), pytest.raises(WindowError, match="layer 1 "):
        model(ids, **documents)


@torch.no_grad()
def test_many_documents_that_were_read_alone_fit_into_a_window(monkeypatch) -> None:
    """No key is farther than a document and a suffix, which is known without reading tensors."""
    monkeypatch.setenv("DREAM_KERNELS_CHECK", "0")
    g = torch.Generator().manual_seed(7)
    documents = torch.randint(3, VOCABULARY, (17, 100), generator=g).tolist()
    ids = torch.randint(3, VOCABULARY, (2, 30), generator=g)
    scores = torch.randn(2, 17, generator=g)
    logits = {}
    for window in (130, 10_000):
        model = make_model("Gemma3", torch.float32, sliding_window=window)
        with inject_attention(model, HEADS) as injection:
            prefix = read_independently(model, documents, header=[1])
            logits[window] = model(ids, document_prefix=prefix, document_scores=scores).logits
            # One more row is too far from where the documents start.
            more = torch.cat([ids, ids[:, :1]], 1)
            if window == 130:
                with pytest.raises(
                    WindowError, match="row 30 is 130 tokens after the start of a d"
                ):
                    model(more, document_prefix=prefix, document_scores=scores)
                joint = read_jointly(
                    model, torch.tensor([documents[0] * 2]), torch.tensor([[[0, 100]]])
                )
                with pytest.raises(
                    WindowError, match="row 29 is 229 tokens after the start of a d"
                ):
                    model(ids, document_prefix=joint, document_scores=scores[:, :1])
            assert injection.layers_that_reach(131) == ([] if window == 130 else [0, 1, 2])
    # The header is out of the window's reach, as it is in the model itself.
    assert (logits[130] - logits[10_000]).abs().max() > 0


def test_attention_dropout_is_refused_in_training_only() -> None:
    model = make_model("Llama", attention_dropout=0.1)
    ids, _, scores = _inputs()
    with inject_attention(model, HEADS):
        model(ids, document_scores=scores, document_spans=SPANS)
        with pytest.raises(ValueError, match="drops attention weights"):
            model.train()(ids, document_scores=scores, document_spans=SPANS)


def test_bad_calls_name_what_is_wrong() -> None:
    model = make_model("Llama")
    ids, mask, scores = _inputs()
    overlapping = torch.tensor([[[2, 6], [5, 9], [10, 11]]])
    with inject_attention(model, HEADS):
        with pytest.raises(ValueError, match=r"document_scores needs document_spans"):
            model(ids, document_scores=scores)
        with pytest.raises(ValueError, match="document_spans needs document_scores"):
            model(ids, document_spans=SPANS)
        with pytest.raises(ValueError, match="disjoint"):
            model(ids, document_scores=scores, document_spans=overlapping)
        with pytest.raises(ValueError, match="4D masks"):
            model(
                ids,
                attention_mask=torch.zeros(2, 1, ROWS, ROWS),
                document_scores=scores,
                document_spans=SPANS,
            )
        with pytest.raises(ValueError, match="packed sequences"):
            model(
                ids,
                position_ids=(torch.arange(ROWS) % 10).expand(2, -1),
                document_scores=scores,
                document_spans=SPANS,
            )
        with pytest.raises(ValueError, match=r"shape \[B, 3, Hq, C\].* got \[2, 2, 6, 3\]"):
            model(ids, document_scores=torch.zeros(2, 2, 6, 3), document_spans=SPANS)
        for name in ("pixel_values", "mm_token_type_ids"):
            with pytest.raises(ValueError, match=f"{name} is not supported with document_scores"):
                model(ids, document_scores=scores, document_spans=SPANS, **{name: mask})
        for name in ("position_bias", "head_mask"):
            with pytest.raises(ValueError, match=f"layer 0: {name} is not supported with documen"):
                model(ids, document_scores=scores, document_spans=SPANS, **{name: mask})
        # A refused call leaves nothing behind.
        model(ids, attention_mask=mask, document_scores=scores, document_spans=SPANS)


def test_read_mass_gives_every_layer_and_head() -> None:
    model = make_model("Llama", torch.float32, attention="eager")
    ids, mask, _ = _inputs(padding="left")
    rows = torch.zeros(2, ROWS)
    rows[:, 16:20] = 0.25
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    with inject_attention(model, {}) as injection:
        mass = injection.read_mass(rows, input_ids=ids, attention_mask=mask, document_spans=SPANS)
    assert mass.shape == (3, 2, 6, 3)
    for layer, probabilities in enumerate(attentions):
        for c, (start, end) in enumerate(SPANS[0].tolist()):
            expected = probabilities[:, :, 16:20, start:end].sum(-1).mean(-1)
            torch.testing.assert_close(mass[layer, :, :, c], expected, rtol=1e-4, atol=1e-5)
