"""The reader: exact spans, the loss of the target alone, clear refusals."""

from __future__ import annotations

import pytest
import torch

from dream_training.reading.likelihood import target_likelihood
from dream_training.reading.reader import Reader, ReaderPrompt
from helpers.tiny import HEADS, decoder_inputs, make_decoder, make_tokenizer

DOCUMENTS = ["First document.", "Ünïcödé, the second\none", "x"]
QUERIES = ["which one?", "a longer question, is it not?"]
TARGETS = ["the first", "yes"]


def make_reader(dtype: torch.dtype = torch.float64, **options) -> Reader:
    return Reader(make_decoder().to(dtype), make_tokenizer(), HEADS, **options)


@pytest.mark.parametrize("context", ("joint", "independent"))
def test_spans_decode_to_the_documents(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_reader(context=context)
    seen = decoder_inputs(reader, monkeypatch)
    prefix = reader.read(DOCUMENTS)
    decode = reader.tokenizer.decode
    header = "<bos>Documents:\n\n"
    if context == "joint":
        text = [decode(seen[0][0, start:end]) for start, end in prefix.spans[0].tolist()]
        assert decode(seen[0][0, : prefix.spans[0, 0, 0]]) == header
    else:
        text = [decode(row[row != 0]).removeprefix(header) for row in seen[0]]
    assert text == [document + "\n\n" for document in DOCUMENTS]
    lengths = [len(document.encode()) + 2 for document in DOCUMENTS]
    assert (prefix.spans[0, :, 1] - prefix.spans[0, :, 0]).tolist() == lengths
    assert prefix.length == 1 + len("Documents:\n\n") + sum(lengths)


@pytest.mark.parametrize("context", ("joint", "independent"))
def test_per_query_pools_hold_their_own_documents(context: str) -> None:
    reader = make_reader(context=context)
    scores = torch.tensor([[0.3, -1.0], [2.0, 0.0]], dtype=torch.float64)
    pools = reader(reader.read(DOCUMENTS, [[0, 2], [1, 0]]), QUERIES, TARGETS, scores)
    for i, pool in enumerate(([0, 2], [1, 0])):
        own = reader.read([DOCUMENTS[j] for j in pool])
        alone = reader(own, QUERIES[i : i + 1], TARGETS[i : i + 1], scores[i : i + 1])
        torch.testing.assert_close(pools.query_losses[i], alone.loss)


def test_the_loss_is_that_of_one_full_sequence() -> None:
    reader = make_reader(context="joint")
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    prefix = reader.read(DOCUMENTS)
    reading = reader(prefix, QUERIES, TARGETS, scores)
    (gradient,) = torch.autograd.grad(reading.loss, scores)

    tokenizer = reader.tokenizer
    text = "Documents:\n\n" + "".join(f"{d}\n\n" for d in DOCUMENTS)
    total, count, per_query = 0.0, 0, []
    for i in range(2):
        before = [1, *tokenizer(f"{text}Question: {QUERIES[i]}\nAnswer:")["input_ids"]]
        target = tokenizer(f" {TARGETS[i]}")["input_ids"]
        logits = reader.model(
            torch.tensor([[*before, *target]]),
            document_scores=scores[i : i + 1],
            document_spans=prefix.spans,
        ).logits[0, len(before) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        total, count = total + loss, count + len(target)
        per_query.append(loss.item() / len(target))
    (expected,) = torch.autograd.grad(total / count, scores)
    assert reading.target_tokens == count
    torch.testing.assert_close(reading.loss, total / count, rtol=1e-6, atol=1e-6)
    assert reading.query_losses.tolist() == pytest.approx(per_query, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pools", (None, [[0, 1], [2, 1], [1, 0]]), ids=("shared", "per query"))
@pytest.mark.parametrize("rows_per_pass", (1, 60, 10_000))
def test_passes_of_any_size_give_one_result(pools, rows_per_pass: int) -> None:
    queries, targets = [*QUERIES, "third"], [*TARGETS, "the last of three"]
    results = []
    for limit in (rows_per_pass, None):
        reader = make_reader(rows_per_pass=limit)
        scores = torch.linspace(-1, 1, 9 if pools is None else 6, dtype=torch.float64)
        scores = scores.view(3, -1).requires_grad_()
        reading = reader(reader.read(DOCUMENTS, pools), queries, targets, scores)
        (3.0 * reading.loss).backward()
        results.append((reading.loss.detach(), reading.query_losses, scores.grad))
        assert reading.target_tokens == sum(1 + len(t) for t in targets)
    assert results[0][2].abs().min() > 0
    for own, whole in zip(*results):
        torch.testing.assert_close(own, whole, rtol=1e-6, atol=1e-9)


def test_a_pass_holds_as_many_rows_as_allowed() -> None:
    reader = make_reader(rows_per_pass=100)
    assert reader.passes([[0] * 30, [0] * 10, [0] * 40], [[0] * 10] * 3) == [[0, 1], [2]]
    assert reader.passes([[0] * 500, [0]], [[0], [0]]) == [[0], [1]]


@pytest.mark.parametrize("rows_per_pass", (1, 10_000))
def test_only_the_rows_that_predict_the_target_are_injected(rows_per_pass: int) -> None:
    """Queries and targets of several lengths against one call of the model for each."""
    reader = make_reader(injected_rows="target", rows_per_pass=rows_per_pass)
    queries, targets = [*QUERIES, "third"], [*TARGETS, "the last of three"]
    scores = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3).requires_grad_()
    prefix = reader.read(DOCUMENTS)
    reading = reader(prefix, queries, targets, scores)
    (gradient,) = torch.autograd.grad(reading.loss, scores)

    losses = []
    for b, (query, target) in enumerate(zip(queries, targets)):
        (before,), (after,) = reader.tokens.queries([query]), reader.tokens.targets([target])
        logits = reader.model(
            torch.tensor([before + after]),
            document_prefix=prefix,
            document_scores=scores[b : b + 1],
            document_first_row=len(before) - 1,
        ).logits[0, len(before) - 1 : -1]
        own = torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none")
        assert reading.query_losses[b].item() == pytest.approx(own.mean().item(), rel=1e-5)
        losses.append(own)
    expected = torch.cat(losses).mean()
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(reading.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    whole = make_reader()(prefix, queries, targets, scores)
    assert (whole.loss - reading.loss).abs() > 1e-4, "the query's rows must make a difference"


def test_without_gradient_the_reader_keeps_nothing() -> None:
    reader = make_reader()
    scores = torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        loss = reader(reader.read(DOCUMENTS), QUERIES, TARGETS, scores).loss
    assert not loss.requires_grad and scores.grad is None
    assert not reader(reader.read(DOCUMENTS), QUERIES, TARGETS, scores.detach()).loss.requires_grad


def test_texts_are_cut_to_their_lengths() -> None:
    reader = make_reader(passage_max_len=4, query_max_len=3, target_max_len=2)
    assert (reader.read(DOCUMENTS).spans.diff(dim=-1).flatten() == torch.tensor([6, 6, 3])).all()
    _, mask, _ = reader.query_rows(QUERIES)
    assert mask.sum(1).tolist() == [len("Question: ") + 3 + len("\nAnswer:")] * 2
    assert reader(reader.read(["d"]), QUERIES, TARGETS, torch.zeros(2, 1)).target_tokens == 4


def test_query_rows_weigh_the_tokens_of_the_query_text_alone() -> None:
    reader = make_reader()
    ids, mask, weights = reader.query_rows(QUERIES)
    for row, query in enumerate(QUERIES):
        assert reader.tokenizer.decode(ids[row][weights[row] > 0]) == query
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert (weights[mask == 0] == 0).all()


def test_the_reader_is_frozen_and_stays_in_eval_mode() -> None:
    reader = make_reader()
    reader.train()
    assert not reader.model.training
    assert not any(p.requires_grad for p in reader.parameters())


@pytest.mark.parametrize("target", ("", "  \n"))
def test_an_empty_target_is_refused(target: str) -> None:
    reader = make_reader()
    with pytest.raises(ValueError, match=r"targets must not be blank, got .* at 1"):
        reader(reader.read(DOCUMENTS), QUERIES, ["fine", target], torch.zeros(2, 3))


def test_a_target_longer_than_the_context_is_refused() -> None:
    reader = make_reader(target_max_len=1000)
    with pytest.raises(ValueError, match=r"target 1 does not fit .* 512 tokens.*target 601"):
        reader(reader.read(DOCUMENTS), QUERIES, ["fine", "y" * 600], torch.zeros(2, 3))


def test_bad_documents_and_options_are_refused() -> None:
    reader = make_reader()
    with pytest.raises(ValueError, match="at least one text"):
        reader.read([])
    with pytest.raises(ValueError, match="must not be blank, got ' ' at 1"):
        reader.read(["a", " "])
    with pytest.raises(ValueError, match="context must be one of"):
        make_reader(context="both")
    with pytest.raises(ValueError, match=r"injected_rows must be one of .* got 'query'"):
        make_reader(injected_rows="query")
    with pytest.raises(ValueError, match="target_max_len must be at least 1"):
        make_reader(target_max_len=0)
    with pytest.raises(ValueError, match=r"prompt.query must contain \{query\} once"):
        ReaderPrompt(query="no placeholder")


def test_a_query_that_is_its_own_target_is_not_read() -> None:
    reader, texts = make_reader(), ["the question", "another"]
    prefix, scores = reader.read(DOCUMENTS), torch.zeros(2, 3, dtype=torch.float64)
    unseen = reader(prefix, texts, texts, scores).query_losses
    assert torch.equal(unseen, reader(prefix, None, texts, scores).query_losses)
    assert not torch.allclose(unseen, reader(prefix, QUERIES, texts, scores).query_losses)
    likelihood = target_likelihood(reader, DOCUMENTS, texts, texts).log_probabilities
    other = target_likelihood(reader, DOCUMENTS, QUERIES, texts).log_probabilities
    assert not torch.allclose(likelihood, other)
    rows = zip(reader.suffix_rows(texts, texts), reader.suffix_rows(QUERIES, texts))
    assert all(own.shape[1] < shown.shape[1] for own, shown in rows)
