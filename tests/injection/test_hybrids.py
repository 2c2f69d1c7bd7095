"""Models with layers that keep a state: what follows a prefix continues from it, or is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from dream_kernels import inject_attention, read_independently, read_jointly
from dream_training.reading.reader import Reader
from helpers.decoders import make_decoder
from helpers.tiny import make_tokenizer

if transformers.__version__ < "5":
    pytest.skip(
        "layers do not continue from a state in older transformers", allow_module_level=True
    )

HEADS = {1: [0, 2], 3: [1]}
SPANS = torch.tensor([[[1, 4], [4, 10]]])


@pytest.fixture(scope="module")
def model():
    return make_decoder("qwen3_next", vocab_size=259)


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))


def _scores() -> torch.Tensor:
    return torch.tensor([[0.5, 2.0], [1.5, -1.0]], dtype=torch.float64, requires_grad=True)


def _gradient(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), scores)[0]


@pytest.mark.parametrize("rows", (1, 6))
def test_suffixes_share_a_prefix_and_leave_it_as_it_is(model, rows: int) -> None:
    documents, ids = _tokens(1, 10), _tokens(2, rows)
    with inject_attention(model, HEADS):
        scores = _scores()
        whole = torch.cat([documents.expand(2, -1), ids], 1)
        expected = model(whole, document_scores=scores, document_spans=SPANS).logits[:, 10:]
        expected_gradient = _gradient(expected, scores)
        prefix = read_jointly(model, documents, SPANS)
        for part in (slice(0, 2), slice(0, 2), slice(1, 2)):
            own = _scores()
            output = model(
                ids[part],
                document_scores=own[part],
                document_prefix=prefix.of_rows(torch.arange(2)[part]),
            )
            gradient = _gradient(output.logits, own)
            # Its delta rule computes in single precision.
            torch.testing.assert_close(output.logits, expected[part], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(
                gradient[part], expected_gradient[part], rtol=1e-4, atol=1e-5
            )
            # Nothing was written back to it: it would continue the documents without the suffix.
            assert output.cache is None


def test_what_would_not_continue_the_states_is_refused(model) -> None:
    ids, documents = _tokens(2, 6), _tokens(1, 10)
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with pytest.raises(ValueError, match="cannot be read independently by Qwen3Next"):
        read_independently(model, [[3, 4], [5]])
    with pytest.raises(ValueError, match="must be read without padding"):
        read_jointly(model, documents, SPANS, (torch.arange(10) < 9)[None].long())
    with inject_attention(model, HEADS) as injection:
        prefix = read_jointly(model, documents, SPANS)
        call = {"input_ids": ids, "document_prefix": prefix, "document_scores": _scores()}
        with pytest.raises(ValueError, match="attention_mask must have its padding at the end"):
            model(**call, attention_mask=padded)
        with pytest.raises(ValueError, match="a cache is not supported with a document_prefix tha"):
            model(**call, use_cache=True)
        with pytest.raises(ValueError, match="a cache is not supported with a document_prefix tha"):
            injection.generate(**call, max_new_tokens=2)
        llama = read_jointly(make_decoder("llama", num_hidden_layers=2), documents, SPANS)
        with pytest.raises(ValueError, match=r"must hold the states of layers \[0, 2\], got tho"):
            model(**{**call, "document_prefix": llama})
        model.gradient_checkpointing_enable()
        model.train()
        try:
            with pytest.raises(ValueError, match="does not go with gradient checkpointing"):
                model(**call)
        finally:
            model.eval()
            model.gradient_checkpointing_disable()


@pytest.mark.parametrize("layer", (0, 2))
def test_heads_of_other_layers_are_refused(model, layer: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"layer {layer}, in which scores cannot act: its type is linear_attention; "
        r"they can in layers \[1, 3\]",
    ):
        inject_attention(model, {layer: [0], 1: [0]})


def test_a_reader_pads_queries_where_no_state_passes_over(model) -> None:
    reader = Reader(model, make_tokenizer(), HEADS, context="joint")
    try:
        prefix = reader.read(["The apple is at 1.", "A river."])
        queries, targets = ["Where is the apple?", "And the river, where?"], ["At 1.", "Far."]
        scores = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        both = reader(prefix, queries, targets, scores)
        alone = [
            reader(prefix, queries[b : b + 1], targets[b : b + 1], scores[b : b + 1])
            for b in range(2)
        ]
        losses = torch.stack([one.loss for one in alone])
        counts = torch.tensor([float(one.target_tokens) for one in alone])
        torch.testing.assert_close(both.loss, (losses * counts).sum() / counts.sum())
        mass = reader.injection.read_mass(
            reader.query_rows(queries)[2],
            input_ids=reader.query_rows(queries)[0],
            attention_mask=reader.query_rows(queries)[1],
            document_prefix=prefix,
        )
        assert mass.shape[:3] == (4, 2, 4)
        assert (mass[[0, 2]] == 0).all() and (mass[[1, 3]] > 0).all()
    finally:
        reader.injection.remove()
