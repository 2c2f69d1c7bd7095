"""The objectives other than DREAM: hand-computed values, plain readings, and what they refuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distillation import EmdrLoss, ReplugLoss
from dream_training.objectives.infonce import PoolInfoNCELoss
from dream_training.objectives.revela import TEXT_PROMPT, RevelaLoss, without_own
from dream_training.reading.likelihood import TargetLikelihood, target_likelihood
from dream_training.reading.reader import Reader
from helpers.objectives import features, make_reader, make_retriever
from helpers.tiny import make_rows

ALL_HEADS = {layer: [0, 1, 2, 3] for layer in range(3)}


def plain_log_probabilities(reader: Reader, context: list[int], target: list[int]) -> Tensor:
    """Log-probabilities of the target tokens in one stock forward pass."""
    ids = torch.tensor([context + target])
    logits = reader.model(input_ids=ids).logits[0].log_softmax(-1)
    places = torch.arange(len(context) - 1, ids.shape[1] - 1)
    return logits[places, torch.tensor(target)].detach()


def test_each_document_is_read_alone() -> None:
    """Against stock forward passes over header, document, query and target."""
    reader = make_reader(query_max_len=20, passage_max_len=30, target_max_len=12)
    documents = ["The apple is red.", "A much longer text about rivers and stones.", "Cloud"]
    queries, targets = ["Where?", "Which apple is it?"], ["here", "the red one"]
    found = target_likelihood(reader, documents, queries, targets)
    for b, (query, target) in enumerate(zip(queries, targets)):
        (tokens,) = reader.tokens.targets([target])
        assert found.token_mask[b].tolist() == [t < len(tokens) for t in range(len(" the red one"))]
        for c, text in enumerate(documents):
            (document,), (asked,) = reader.tokens.documents([text]), reader.tokens.queries([query])
            context = reader.tokens.header + document + asked
            expected = plain_log_probabilities(reader, context, tokens)
            torch.testing.assert_close(found.log_probabilities[b, c, : len(tokens)], expected)
            assert not found.log_probabilities[b, c, len(tokens) :].any()


def test_only_the_pairs_of_a_pool_are_read() -> None:
    reader = make_reader()
    documents, queries, targets = ["one", "two", "three"], ["a", "b"], ["x", "y z"]
    whole = target_likelihood(reader, documents, queries, targets).log_probabilities
    part = target_likelihood(reader, documents, queries, targets, [[2, 0], [1]])
    torch.testing.assert_close(part.log_probabilities[0, 0], whole[0, 2])
    torch.testing.assert_close(part.log_probabilities[0, 1], whole[0, 0])
    torch.testing.assert_close(part.log_probabilities[1, 0], whole[1, 1])
    assert not part.log_probabilities[1, 1].any()


def evidence(*log_probabilities: list[list[float]]) -> TargetLikelihood:
    """One query each: ``[C][T]``."""
    values = torch.tensor(log_probabilities)
    return TargetLikelihood(values, torch.ones(len(values), values.shape[2], dtype=torch.bool))


HALF, QUARTER = math.log(0.5), math.log(0.25)


def replug(tiny_model, **options) -> ReplugLoss:
    return ReplugLoss(make_retriever(tiny_model), make_reader(), **options)


def test_replug_by_hand(tiny_model) -> None:
    """Mean log-probabilities log 1/2 and log 1/4 at temperature 1: teacher (2/3, 1/3)."""
    taught = evidence([[HALF, HALF], [HALF, math.log(0.125)]])
    scores = torch.tensor([[math.log(3.0), 0.0]])  # student (3/4, 1/4)
    teacher, student = (2 / 3, 1 / 3), (0.75, 0.25)
    forward = sum(t * math.log(t / s) for t, s in zip(teacher, student))
    backward = sum(s * math.log(s / t) for t, s in zip(teacher, student))
    loss = replug(tiny_model, teacher_temperature=1.0)
    assert loss.loss(scores, taught, {}, {}).item() == pytest.approx(forward, rel=1e-5)
    loss = replug(tiny_model, teacher_temperature=1.0, direction="student_teacher")
    assert loss.loss(scores, taught, {}, {}).item() == pytest.approx(backward, rel=1e-5)


def test_replug_with_probabilities_by_hand(tiny_model) -> None:
    """Probabilities 1/2 and 1/4 at temperature 1/4: logits 2 and 1."""
    taught = evidence([[HALF], [QUARTER]])
    scores = torch.zeros(1, 2)
    teacher = torch.tensor([2.0, 1.0]).softmax(0)
    expected = (teacher * (teacher.log() - math.log(0.5))).sum().item()
    loss = replug(tiny_model, teacher="probability", teacher_temperature=0.25)
    assert loss.loss(scores, taught, {}, {}).item() == pytest.approx(expected, rel=1e-5)


def test_a_document_outside_the_pool_has_no_part_in_replug(tiny_model) -> None:
    loss = replug(tiny_model, teacher_temperature=1.0)
    scores = torch.tensor([[0.3, -0.2, -math.inf]], requires_grad=True)
    value = loss.loss(scores, evidence([[HALF], [QUARTER], [0.0]]), {}, {})
    alone = loss.loss(scores[:, :2], evidence([[HALF], [QUARTER]]), {}, {})
    torch.testing.assert_close(value, alone)
    value.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all() and scores.grad[0, 2] == 0


def test_emdr_by_hand(tiny_model) -> None:
    """Two tokens, weights (3/4, 1/4): the marginal likelihood of each token, then its log."""
    loss = EmdrLoss(make_retriever(tiny_model), make_reader())
    scores = torch.tensor([[math.log(3.0), 0.0]])
    taught = evidence([[HALF, QUARTER], [QUARTER, HALF]])
    first, second = 0.75 * 0.5 + 0.25 * 0.25, 0.75 * 0.25 + 0.25 * 0.5
    expected = -(math.log(first) + math.log(second)) / 2
    assert loss.loss(scores, taught, {}, {}).item() == pytest.approx(expected, rel=1e-5)


def test_infonce_by_hand(tiny_model) -> None:
    loss = PoolInfoNCELoss(make_retriever(tiny_model))
    scores = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, -math.inf]])
    first = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + 1))
    value = loss.loss(scores, torch.tensor([1, 0]), {}, {})
    assert value.item() == pytest.approx((first + math.log(2)) / 2, rel=1e-5)


def test_infonce_over_a_shared_pool_is_the_librarys_loss(tiny_model) -> None:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = make_retriever(tiny_model)
    query, pool = features(model, make_rows(4))
    own = PoolInfoNCELoss(model, temperature=0.1)([query, pool])
    inputs = [{k: v for k, v in f.items() if torch.is_tensor(v)} for f in (query, pool)]
    library = MultipleNegativesRankingLoss(model, scale=10.0)(inputs, None)
    torch.testing.assert_close(own.double(), library.double(), rtol=1e-5, atol=1e-6)


def test_infonce_asks_for_labels(tiny_model) -> None:
    rows = make_rows(3)
    rows[1]["positive"] = -1
    model = make_retriever(tiny_model)
    with pytest.raises(ValueError, match="known positive for every query, 'Where is the river 1"):
        PoolInfoNCELoss(model)(features(model, rows))


def test_revela_hides_a_text_from_itself() -> None:
    """Row i of the shared pool equals a reading of the other documents alone."""
    reader = make_reader(ALL_HEADS, prompt=TEXT_PROMPT, passage_max_len=40, target_max_len=40)
    texts = ["The apple is red.", "A river runs to the sea.", "Stones are hard things."]
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prefix = without_own(reader.read(texts))
    together = reader(prefix, None, texts, scores)
    for i, text in enumerate(texts):
        others = [j for j in range(3) if j != i]
        alone = reader.read([texts[j] for j in others])
        alone.next_position.fill_(int(prefix.next_position[0]))
        reading = reader(alone, None, [text], scores[i : i + 1, others])
        torch.testing.assert_close(together.query_losses[i], reading.query_losses[0])


def test_revela_runs_in_parts_as_in_one(tiny_model) -> None:
    texts = ["The apple is red.", "A river runs to the sea.", "Stones are hard things."]
    values = []
    for rows in (None, 1):
        options = {"passage_max_len": 40, "target_max_len": 40, "rows_per_pass": rows}
        reader = make_reader(ALL_HEADS, prompt=TEXT_PROMPT, **options)
        loss = RevelaLoss(make_retriever(tiny_model), reader, temperature=0.1)
        data = [{"query": "q", "target": "t", "documents": [text]} for text in texts]
        values.append(loss(features(loss.model, data)))
        assert loss.metrics["max_entropy"] == pytest.approx(math.log(2))  # of the two others
        assert 0 < loss.metrics["entropy"] <= math.log(2) + 1e-6  # two others each
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("kind", (ReplugLoss, EmdrLoss, RevelaLoss))
def test_the_gradient_reaches_the_retriever(tiny_model, kind) -> None:
    options = {"prompt": TEXT_PROMPT} if kind is RevelaLoss else {}
    reader = make_reader(ALL_HEADS, **options)
    loss = kind(make_retriever(tiny_model), reader, temperature=0.1)
    for parameter in loss.model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B starts at zero
            parameter.data.normal_(std=0.3)
    inputs = features(loss.model, make_rows(4))
    parameters = [p for p in loss.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(inputs), parameters)
    # along the gradient the loss falls
    before = loss(inputs).item()
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norm > 1e-4
    for parameter, gradient in zip(parameters, gradients):
        parameter.data -= 1e-3 / norm * gradient
    assert loss(inputs).item() == pytest.approx(before - 1e-3 * norm, abs=2e-4 * norm)
    assert loss.metrics["loss"] == pytest.approx(loss(inputs).item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"teacher": "loss"}, "teacher must be one of .* got 'loss'"),
        ({"direction": "both"}, "direction must be one of .* got 'both'"),
        ({"teacher_temperature": -1.0}, "teacher_temperature must be positive, got -1.0"),
    ],
)
def test_bad_options_are_named(tiny_model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        replug(tiny_model, **options)


def test_revela_needs_another_document(tiny_model) -> None:
    loss = RevelaLoss(make_retriever(tiny_model), make_reader(ALL_HEADS, prompt=TEXT_PROMPT))
    data = [{"query": "q", "target": "t", "documents": ["a"]}] * 2
    with pytest.raises(ValueError, match="at least two documents"):
        loss(features(loss.model, data))


def test_a_batch_without_texts_is_refused(tiny_model) -> None:
    model = make_retriever(tiny_model)
    batch = DreamCollator(model)(make_rows(2))
    with pytest.raises(ValueError, match="EmdrLoss needs the texts beside the tokens"):
        EmdrLoss(model, make_reader())([{"input_ids": batch["query_input_ids"]}])


@pytest.mark.parametrize("changes", [{}, {"mini_batch_size": 2}, {"documents_per_query": 1}])
def test_every_form_of_infonce_records_loss_and_tokens(run, changes) -> None:
    from dream_training.history import describe
    from dream_training.training.driver import train

    steps = train(run(objective="infonce", eval_data=None, max_steps=2, **changes)).history.steps
    assert len(steps) == 2
    for step in steps:
        assert step["loss"] > 0 and step["tokens"] > 0
        assert re.search(r"^loss \d.*tokens/s", describe(step))
