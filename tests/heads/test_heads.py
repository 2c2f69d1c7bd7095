"""Each criterion's scores equal those computed from whole attention matrices, or finite changes."""

from __future__ import annotations

import math

import pytest
import torch

from dream_kernels.injection import WindowError
from dream_training.choices import HEAD_CRITERIA
from dream_training.heads.gradient import gradient_scores
from dream_training.heads.mass import filtered_sums, qr_ndcg
from dream_training.heads.selection import HeadExample, head_examples, make_pools, select_heads
from dream_training.reading.reader import Reader
from helpers.injected_models import make_model
from helpers.tiny import make_decoder, make_tokenizer

EXAMPLES = [
    HeadExample(query, target, (document,), 0)
    for query, target, document in (
        ("where is the apple", "here", "The apple is here."),
        ("what of the river", "runs south", "A river runs south."),
        ("is there a stone", "hard", "Stones are hard."),
        ("who saw the cloud", "white", "Clouds are white, mostly."),
        ("and the tiger", "a lot", "Tigers sleep a lot."),
    )
]


@pytest.fixture(scope="module")
def calibrated() -> list[tuple[torch.Tensor, list[tuple[int, int]]]]:
    """Attention of each query's tokens above the null query's, ``[layers, heads, keys]``."""
    model, tokenizer = make_decoder(), make_tokenizer()
    model.config._attn_implementation = "eager"
    out = []
    for pool in (EXAMPLES[:3], EXAMPLES[3:]):
        text = [1, *tokenizer("Documents:\n\n")["input_ids"]]
        spans = []
        for example in pool:
            start = len(text)
            text += tokenizer(f"{example.gold}\n\n")["input_ids"]
            spans.append((start, len(text)))

        def query_attention(query: str, text=text) -> torch.Tensor:
            before = [*text, *tokenizer("Question: ")["input_ids"]]
            own = tokenizer(query)["input_ids"]
            ids = torch.tensor([[*before, *own, *tokenizer("\nAnswer:")["input_ids"]]])
            with torch.no_grad():
                attentions = torch.cat(model(ids, output_attentions=True).attentions)
            return attentions[:, :, len(before) : len(before) + len(own), : len(text)].mean(2)

        null = query_attention("N/A")
        out += [(query_attention(example.query) - null, spans) for example in pool]
    return out


def _gold_place(i: int) -> int:
    return i if i < 3 else i - 3


def _select(**options):
    reader = Reader(make_decoder(), make_tokenizer(), {}, context="joint")
    return select_heads(reader, EXAMPLES, pool_size=3, **options)


def _assert_scores(selected, expected: torch.Tensor) -> None:
    assert len(selected.heads) == 12
    for (layer, head), score in selected.scores.items():
        assert score == pytest.approx(expected[layer, head].item(), abs=2e-5)
    assert selected.heads == sorted(selected.scores, key=lambda h: -selected.scores[h])


def test_qr_mass_equals_that_of_attention_matrices(calibrated) -> None:
    expected = torch.zeros(3, 4)
    for i, (scores, spans) in enumerate(calibrated):
        start, end = spans[_gold_place(i)]
        expected += scores[..., start:end].sum(-1) / len(EXAMPLES)
    selected = _select(criterion="qr_mass")
    _assert_scores(selected, expected)
    assert selected.provenance["criterion"] == "qr_mass"
    assert selected.provenance["examples"] == 5 and selected.provenance["null_query"] == "N/A"


def test_the_token_filter_drops_tokens_far_below_their_documents_mean(calibrated) -> None:
    expected, unfiltered = torch.zeros(3, 4), torch.zeros(3, 4)
    for i, (scores, spans) in enumerate(calibrated):
        start, end = spans[_gold_place(i)]
        own = scores[..., start:end]
        least = own.mean(-1) - 2 * own.std(-1, correction=0)
        for layer in range(3):
            for head in range(4):
                kept = [s for s in own[layer, head].tolist() if s >= least[layer, head].item()]
                expected[layer, head] += sum(kept) / len(EXAMPLES)
        unfiltered += own.sum(-1) / len(EXAMPLES)
    assert (expected - unfiltered).abs().max() > 1e-3
    selected = _select(criterion="qr_mass", token_filter=True)
    _assert_scores(selected, expected)
    assert selected.provenance["token_filter"] is True


def test_queries_in_several_passes_give_the_same_scores(monkeypatch) -> None:
    import dream_training.heads.mass as module

    whole = _select(criterion="qr_mass", token_filter=True)
    monkeypatch.setattr(module, "_MASS_ELEMENTS", 1)
    parts = _select(criterion="qr_mass", token_filter=True)
    assert parts.scores == pytest.approx(whole.scores, abs=1e-6)


def test_a_document_of_one_token_passes_the_filter() -> None:
    sums = filtered_sums(torch.tensor([-3.0, 1.0, 1.0]), torch.tensor([0, 1, 1]), 2)
    assert sums.tolist() == [-3.0, 2.0]


def test_qr_ndcg_equals_that_of_attention_matrices(calibrated) -> None:
    expected = torch.zeros(3, 4)
    for i, (scores, spans) in enumerate(calibrated):
        of_documents = torch.stack([scores[..., start:end].sum(-1) for start, end in spans], -1)
        order = of_documents.argsort(-1, descending=True)
        rank = 1 + (order == _gold_place(i)).int().argmax(-1)
        expected += 1 / torch.log2(1.0 + rank) / len(EXAMPLES)
    assert expected.unique().numel() > 3
    _assert_scores(_select(criterion="qr_ndcg"), expected)


def test_ndcg_ends_at_rank_ten_and_ties_earn_nothing() -> None:
    scores = torch.arange(12.0).neg()[None, None, None].repeat(1, 3, 1, 1)  # [1, 3, 1, 12]
    scores[0, 2] = 0.0
    values = qr_ndcg(scores, torch.tensor([9, 10, 0])).flatten().tolist()
    assert values == pytest.approx([1 / math.log2(11), 0.0, 0.0])


@pytest.mark.parametrize("point", ("own", "uniform"))
def test_the_loss_gradient_is_the_derivative_in_the_weight(point: str) -> None:
    """Weight is moved in one head, from uniform to the preferred document, and the loss follows."""
    reader = Reader(make_decoder().double(), make_tokenizer(), {})
    queries, targets = [e.query for e in EXAMPLES[:3]], [e.target for e in EXAMPLES[:3]]
    documents = [e.gold for e in EXAMPLES]
    found = gradient_scores(reader, queries, targets, documents, point)
    assert reader.injection.heads == {}, "the reader's own heads come back"

    prefix = reader.read(documents)
    weights = torch.full((3, 3, 4, 5), 0.2)
    if point == "own":
        ids, mask, rows = reader.suffix_rows(queries, targets)
        weights = reader.injection.read_mass(
            rows, input_ids=ids, attention_mask=mask, document_prefix=prefix
        ).transpose(0, 1)
        weights = weights / weights.sum(-1, keepdim=True)
    reader.injection.use_heads({layer: range(4) for layer in range(3)})
    for layer, head in ((0, 1), (1, 2), (2, 3)):
        losses = []
        # As far as the least weight allows: losses are float32, and a small step drowns in them.
        step = min(0.02, 4 * weights[:, layer, head].min().item())
        for sign in (1, -1):
            moved = weights.double().clone()
            moved[:, layer, head] -= sign * step / 5
            moved[torch.arange(3), layer, head, found.preferred] += sign * step
            reading = reader(prefix, queries, targets, moved.log())
            counts = torch.tensor(list(map(len, reader.tokens.targets(targets))))
            losses.append(reading.query_losses.double() * counts)
        expected = -(losses[0] - losses[1]) / (2 * step)
        actual = found.drop[:, layer, head].double()
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-3)
    assert found.drop.abs().max() > 0.05
    # The preferred document is the one that all heads together gain most by.
    assert (found.drop.sum((1, 2)) >= 0).all()


def test_the_loss_gradient_in_mode_bias_is_taken_at_the_unchanged_reader() -> None:
    reader = Reader(make_decoder().double(), make_tokenizer(), {}, mode="bias")
    queries, targets = [e.query for e in EXAMPLES[:2]], [e.target for e in EXAMPLES[:2]]
    documents = [e.gold for e in EXAMPLES]
    found = gradient_scores(reader, queries, targets, documents)
    plain = reader(reader.read(documents), queries, targets, torch.zeros(2, 5))
    assert found.loss == pytest.approx(plain.loss.item(), rel=1e-6)
    assert found.drop.shape == (2, 3, 4) and found.drop.abs().max() > 1e-3


def test_the_loss_gradient_finds_the_heads_that_affect_the_loss() -> None:
    """All heads but three are cut off after the attention."""
    model = make_decoder()
    heard = {(0, 2), (1, 0), (2, 3)}
    for layer, block in enumerate(model.model.layers):
        for head in range(4):
            if (layer, head) not in heard:
                block.self_attn.o_proj.weight.data[:, 8 * head : 8 * (head + 1)] = 0.0
    reader = Reader(model, make_tokenizer(), {})
    unlabelled = [HeadExample(e.query, e.target, e.documents) for e in EXAMPLES]
    selected = select_heads(reader, unlabelled, criterion="loss_gradient", pool_size=5)
    deaf = [score for head, score in selected.scores.items() if head not in heard]
    assert len(deaf) == 9 and not any(deaf)
    assert all(abs(selected.scores[head]) > 1e-4 for head in heard)
    assert selected.heads[0] in heard
    assert "prefers_the_positive" not in selected.provenance
    labelled = select_heads(reader, EXAMPLES, criterion="loss_gradient", pool_size=5)
    assert labelled.scores == selected.scores, "the positives are only looked at afterwards"
    assert 0 <= labelled.provenance["prefers_the_positive"] <= 1


def test_random_heads_are_all_heads_in_an_order_of_the_seed() -> None:
    orders = [_select(criterion="random", seed=seed) for seed in (0, 0, 1)]
    assert orders[0].heads == orders[1].heads != orders[2].heads
    assert sorted(orders[0].heads) == [(layer, head) for layer in range(3) for head in range(4)]
    assert orders[0].scores == {} and orders[2].provenance["seed"] == 1


def test_a_last_pool_of_one_joins_the_previous_one() -> None:
    assert list(map(len, make_pools(EXAMPLES, 2))) == [2, 3]


def test_examples_are_drawn_from_lines_with_a_known_positive() -> None:
    from datasets import Dataset

    rows = [
        {"query": str(i), "target": "t", "documents": ["a", "b"], "positive": i % 2 - (i == 4)}
        for i in range(8)
    ]
    data = Dataset.from_list(rows)
    drawn = head_examples(data, 5, 0, labelled=True)
    assert len(drawn) == 5 and all(e.positive >= 0 for e in drawn)
    assert {e.gold for e in drawn} == {"a", "b"}
    assert drawn == head_examples(data, 5, 0, labelled=True)
    assert drawn != head_examples(data, 5, 1, labelled=True)
    assert len(head_examples(data, 100, 0, labelled=False)) == 8
    with pytest.raises(ValueError, match=r"known positive, and there are 1.*loss_gradient"):
        head_examples(data.select([1, 4]), 5, 0, labelled=True)


def test_too_little_to_choose_from_is_refused() -> None:
    reader = Reader(make_decoder(), make_tokenizer(), {})
    with pytest.raises(ValueError, match="at least 2, got 1"):
        select_heads(reader, EXAMPLES[:1])
    with pytest.raises(ValueError, match="pool_size must be at least 2"):
        select_heads(reader, EXAMPLES, pool_size=1)
    with pytest.raises(ValueError, match=r"criterion must be one of .*'qr_mass'.* got 'best'"):
        select_heads(reader, EXAMPLES, criterion="best")
    with pytest.raises(ValueError, match=r"point must be one of .* got 'here'"):
        select_heads(reader, EXAMPLES, criterion="loss_gradient", point="here")
    unknown = [*EXAMPLES[:2], HeadExample("q", "t", ("d",))]
    with pytest.raises(ValueError, match="example 2 has none"):
        select_heads(reader, unknown, criterion="qr_ndcg")


@pytest.mark.parametrize("criterion", HEAD_CRITERIA)
def test_layers_whose_window_is_too_short_are_left_out(criterion: str) -> None:
    """The last of three layers sees everything; a window of the others ends within the texts."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = make_model(
        "Gemma3", torch.float32, sliding_window=30, layer_types=kinds, vocab_size=259
    )
    reader = Reader(model, make_tokenizer(), {})
    selected = select_heads(reader, EXAMPLES, criterion=criterion, pool_size=5)
    assert {layer for layer, _ in selected.heads} == {2} and len(selected.heads) == 6
    assert selected.provenance["layers_left_out"] == [0, 1]
    reader.injection.use_heads(selected, 6)
    losses = reader(
        reader.read(["The apple is at 1."]), ["Where is the apple?"], ["At 1."], torch.zeros(1, 1)
    )
    assert torch.isfinite(losses.loss)
    none = make_model("Gemma3", torch.float32, sliding_window=30, vocab_size=259)
    with pytest.raises(WindowError, match="no layer of the reader has a sliding window of"):
        select_heads(Reader(none, make_tokenizer(), {}), EXAMPLES, criterion=criterion, pool_size=5)
