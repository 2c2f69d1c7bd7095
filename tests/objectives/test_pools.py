"""Which documents compete: shared pools, pools of each query, and the draw of candidates."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from dream_training.config import TrainConfig
from dream_training.models.retriever import build_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.pools import build_pools, choose_candidates, pool_scores
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from helpers.objectives import features, with_candidates
from helpers.tiny import HEADS, make_decoder, make_rows, make_tokenizer

CANDIDATES = [(["a", "b", "c"], 1), (["c", "d"], -1), (["e", "a", "e"], 2)]
QUERIES = ["q1", "q2", "q3"]


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    return build_retriever(tiny_model, layers=2, lora_r=4, dtype="float32", device="cpu")


def test_both_joins_all_candidates() -> None:
    texts, pools, positives = build_pools(CANDIDATES, "both")
    assert texts == ["a", "b", "c", "d", "e"]
    assert pools is None and positives == [1, -1, 4]


def test_in_batch_takes_the_relevant_document_or_the_first() -> None:
    chosen = choose_candidates(QUERIES, CANDIDATES, "in_batch")
    assert build_pools(chosen, "in_batch") == (["b", "c", "e"], None, [0, -1, 2])


def test_mined_gives_each_query_its_own() -> None:
    texts, pools, positives = build_pools(CANDIDATES, "mined")
    assert texts == ["a", "b", "c", "d", "e"]
    assert pools == [[0, 1, 2], [2, 3], [4, 0]]
    assert positives == [1, -1, 0]
    for pool, place, (documents, known) in zip(pools, positives, CANDIDATES):
        assert known < 0 or texts[pool[place]] == documents[known]


def test_the_draw_keeps_the_relevant_document_and_repeats_itself() -> None:
    candidates = [([f"d{i}" for i in range(20)], 7), ([f"e{i}" for i in range(20)], -1), (["f"], 0)]
    draws = [choose_candidates(QUERIES, candidates, "both", 4, seed) for seed in range(30)]
    for (first, known), (second, unknown), third in draws:
        assert len(first) == len(set(first)) == 4 and first[known] == "d7"
        assert first == sorted(first, key=lambda text: int(text[1:])), "the order stays"
        assert len(set(second)) == 4 and unknown == -1
        assert third == (["f"], 0)
    seen = {text for (first, _), *_ in draws for text in first}
    assert len(seen) == 20, "some candidate is never drawn"
    assert draws[3] == choose_candidates(QUERIES, candidates, "both", 4, 3)
    assert draws[3] != choose_candidates(QUERIES[::-1], candidates, "both", 4, 3)


def test_a_draw_holds_no_text_twice() -> None:
    candidates = [(["x", "y", "x", "y", "z"], 2)]
    for seed in range(20):
        ((documents, known),) = choose_candidates(["q"], candidates, "both", 3, seed)
        assert sorted(documents) == ["x", "y", "z"] and documents[known] == "x"


def test_scores_of_a_pool() -> None:
    scores = torch.arange(12.0).view(2, 6).requires_grad_()
    picked, present = pool_scores(scores, [[5, 0, 2], [1]])
    assert picked.tolist() == [[5.0, 0.0, 2.0], [7.0, -math.inf, -math.inf]]
    assert present.tolist() == [[True] * 3, [True, False, False]]
    torch.softmax(picked, -1)[:, 0].sum().backward()
    assert (scores.grad[0] != 0).tolist() == [True, False, True, False, False, True]
    assert not scores.grad[1].any()
    assert pool_scores(scores, [[1, 2], [3, 4]])[1] is None
    assert pool_scores(scores)[0] is scores


@pytest.mark.parametrize("context", ("independent", "joint"))
def test_mined_pools_give_the_gradient_of_each_query_alone(model, context: str) -> None:
    """One batch against one query after the other, each a shared pool of its own candidates."""
    rows = with_candidates()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data.normal_(std=0.3)
    reader = Reader(make_decoder(), make_tokenizer(), HEADS, context=context)
    loss = DreamLoss(model, reader, temperature=0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(rows: list[dict], pool: str):
        value = loss(features(model, rows, pool=pool))
        return value, torch.autograd.grad(value, parameters), dict(loss.metrics)

    value, gradient, metrics = run(rows, "mined")
    alone = [run([row], "both") for row in rows]
    shares = [len(f" {row['target']}") for row in rows]
    shares = [share / sum(shares) for share in shares]  # one token per byte
    assert metrics["weight_on_positive"] == pytest.approx(
        sum(own["weight_on_positive"] for _, _, own in alone) / 5, rel=1e-4
    )
    for name in ("entropy", "max_entropy"):
        assert metrics[name] == pytest.approx(sum(own[name] for *_, own in alone) / 5, rel=1e-4)
    expected = sum(share * own for share, (own, *_) in zip(shares, alone))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for i, actual in enumerate(gradient):
        expected = sum(share * own[i] for share, (_, own, _) in zip(shares, alone))
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-5)
    assert max(g.abs().max() for g in gradient) > 1e-3


def test_queries_without_a_choice_are_refused(model) -> None:
    with pytest.raises(ValueError, match="'mined' needs queries with at least two candidates"):
        DreamCollator(model, pool="mined")(make_rows(3))
    with pytest.raises(ValueError, match=r"'in_batch' needs a document of every .* 'q' has none"):
        DreamCollator(model, pool="in_batch")([{"query": "q", "target": "t", "documents": []}])
    with pytest.raises(ValueError, match="pool must be one of"):
        DreamCollator(model, pool="all")


@pytest.mark.parametrize(
    "objective, pool",
    (
        ("direct", "both"),
        ("direct", "mined"),
        ("dream", "both"),
        ("dream", "in_batch"),
        ("dream", "mined"),
        ("replug", "mined"),
        ("emdr", "mined"),
        ("infonce", "mined"),
    ),
)
def test_the_driver_takes_every_pool(tiny_model, tmp_path, objective: str, pool: str) -> None:
    rows = with_candidates(12)
    rows[3]["positive"] = None
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(
        reader=str(tiny_model), retriever=str(tiny_model), retriever_layers=1, lora_r=2,
        train_data=str(data), top_k=4, pool=pool, batch_size=4, max_steps=2, device="cpu",
        objective="dream" if objective == "direct" else objective,
        teaching="direct" if objective == "direct" else "distilled",
        documents_per_query=None if pool == "in_batch" else 2,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    steps = train(config, console=Console(file=io.StringIO())).history.steps
    size = {"in_batch": (4, 4), "mined": (2, 2), "both": (4, 8)}[pool]
    for step in steps:
        assert math.isfinite(step["loss"]) and 0 < step["weight_on_positive"] < 1
        assert math.log(size[0]) - 1e-6 <= step["max_entropy"] <= math.log(size[1]) + 1e-6
