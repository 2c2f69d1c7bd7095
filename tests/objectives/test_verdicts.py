"""What the reader said is kept: by its texts and its settings, and to the same bits."""

from __future__ import annotations

import pytest
import torch

from dream_training.objectives.verdicts import Verdicts, reader_identity
from dream_training.reading.prompts import ReaderPrompt
from helpers.objectives import features, make_distilled_loss, make_reader, with_candidates
from helpers.tiny import HEADS, make_rows


def never(*arguments: object) -> None:
    raise AssertionError("the reader reads again")


@pytest.mark.parametrize("pool", ("both", "mined"))
def test_a_batch_that_was_read_is_not_read_again(tiny_model, pool: str) -> None:
    """Not by another loss either; the loss and the retriever's gradient are the same bits."""
    verdicts = Verdicts()
    loss, again = (make_distilled_loss(tiny_model, verdicts=verdicts) for _ in range(2))
    plain = make_distilled_loss(tiny_model)
    rows = with_candidates()
    inputs = features(loss.model, rows, pool=pool)

    def run(own):
        parameters = [p for p in own.model.parameters() if p.requires_grad]
        value = own(inputs)
        return [value, *torch.autograd.grad(value, parameters)]

    expected = run(plain)
    first = run(loss)
    assert (verdicts.hits, verdicts.misses, len(verdicts)) == (0, 5, 5)
    read = loss.metrics["tokens"]
    again.reader.read = never
    second = run(again)
    assert (verdicts.hits, verdicts.misses) == (5, 5)
    for values in zip(expected, first, second):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    encoded = sum(int(f["attention_mask"].sum()) for f in inputs)
    assert again.metrics["tokens"] == encoded < read


@pytest.mark.parametrize("column", ("query", "target", "documents"))
def test_another_text_is_another_question(tiny_model, column: str) -> None:
    verdicts = Verdicts()
    loss = make_distilled_loss(tiny_model, verdicts=verdicts)
    rows = make_rows(3)
    loss(features(loss.model, rows))
    rows[1][column] = ["Another text."] if column == "documents" else "another text"
    worth = loss.read(*features(loss.model, rows))
    assert verdicts.hits == 0 and verdicts.misses == 6
    torch.testing.assert_close(
        worth, make_distilled_loss(tiny_model).read(*features(loss.model, rows))
    )
    # The pool is everyone's; query and target are one row's.
    assert len(verdicts) == (6 if column == "documents" else 4)


@pytest.mark.parametrize(
    "changes",
    (
        {"heads": {0: [2]}},
        {"context": "joint"},
        {"document_mass": 0.5},
        {"mode": "bias"},
        {"injected_rows": "target"},
        {"target_max_len": 3},
        {"prompt": ReaderPrompt(header="Texts:\n\n")},
    ),
    ids=lambda changes: "_".join(changes),
)
def test_another_reader_is_asked_again(changes: dict) -> None:
    changes = dict(changes)
    heads = changes.pop("heads", HEADS)
    reader = make_reader(HEADS)
    identity = reader_identity(reader)
    assert identity == reader_identity(make_reader(HEADS))
    assert identity != reader_identity(make_reader(heads, **changes))


def test_other_weights_are_another_reader() -> None:
    reader = make_reader(HEADS)
    identity = reader_identity(reader)
    reader.model.lm_head.weight.data[0, 0] += 1e-3
    assert reader_identity(reader) != identity
