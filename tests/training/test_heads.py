"""QR scores equal those computed from whole attention matrices."""

from __future__ import annotations

import pytest
import torch
from tiny import make_decoder, make_tokenizer

from dream_training.heads import select_heads
from dream_training.reader import Reader

EXAMPLES = [
    ("where is the apple", "The apple is here."),
    ("what of the river", "A river runs south."),
    ("is there a stone", "Stones are hard."),
    ("who saw the cloud", "Clouds are white, mostly."),
    ("and the tiger", "Tigers sleep a lot."),
]


def test_scores_equal_those_of_attention_matrices() -> None:
    model = make_decoder()
    tokenizer = make_tokenizer()
    reader = Reader(model, tokenizer, {}, context="joint")
    selected = select_heads(reader, EXAMPLES, pool_size=3)
    reader.injection.remove()
    model.config._attn_implementation = "eager"

    expected = torch.zeros(3, 4)
    for pool in (EXAMPLES[:3], EXAMPLES[3:]):
        text = [1, *tokenizer("Documents:\n\n")["input_ids"]]
        spans = []
        for _, document in pool:
            start = len(text)
            text += tokenizer(f"{document}\n\n")["input_ids"]
            spans.append((start, len(text)))

        def query_attention(query: str, text=text) -> torch.Tensor:
            """Mean attention of the query's tokens: [layers, heads, keys]."""
            before = [*text, *tokenizer("Question: ")["input_ids"]]
            own = tokenizer(query)["input_ids"]
            ids = torch.tensor([[*before, *own, *tokenizer("\nAnswer:")["input_ids"]]])
            with torch.no_grad():
                attentions = torch.cat(model(ids, output_attentions=True).attentions)
            return attentions[:, :, len(before) : len(before) + len(own)].mean(2)

        null = query_attention("N/A")
        for (query, _), (start, end) in zip(pool, spans):
            asked = query_attention(query)
            expected += asked[..., start:end].sum(-1) - null[..., start:end].sum(-1)
    expected /= len(EXAMPLES)
    for (layer, head), score in selected.scores.items():
        assert score == pytest.approx(expected[layer, head].item(), abs=2e-5)
    assert selected.heads == sorted(selected.scores, key=lambda h: -selected.scores[h])
    assert len(selected.heads) == 12
    assert selected.provenance["examples"] == 5 and selected.provenance["null_query"] == "N/A"


def test_a_last_pool_of_one_joins_the_one_before() -> None:
    reader = Reader(make_decoder(), make_tokenizer(), {})
    done = []
    select_heads(reader, EXAMPLES, pool_size=2, progress=lambda d, total: done.append((d, total)))
    assert done == [(2, 5), (5, 5)]


def test_too_little_to_choose_from_is_refused() -> None:
    reader = Reader(make_decoder(), make_tokenizer(), {})
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        select_heads(reader, EXAMPLES[:1])
    with pytest.raises(ValueError, match="pool_size must be at least 2"):
        select_heads(reader, EXAMPLES, pool_size=1)
