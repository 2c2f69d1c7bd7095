"""The paired test between two retrievers."""

from __future__ import annotations

import random

import pytest

from dream_training.evaluation import compare_queries


def scores(seed: int, shift: float = 0.0, count: int = 60) -> dict[str, float]:
    rng = random.Random(seed)
    return {f"q{i}": rng.random() + shift for i in range(count)}


def test_counts_and_means() -> None:
    a = {"1": 0.2, "2": 0.5, "3": 0.5, "4": 1.0}
    b = {"4": 0.9, "3": 0.5, "2": 0.8, "1": 0.4}
    result = compare_queries(a, b)
    assert (result.wins, result.ties, result.losses, result.queries) == (2, 1, 1, 4)
    assert result.mean_a == pytest.approx(0.55) and result.mean_b == pytest.approx(0.65)
    assert result.difference == pytest.approx(0.1)
    # Of the 8 ways to swap the 3 queries that differ, +-(0.2 + 0.3 -+ 0.1) reach 0.4: 4 of them.
    assert result.p_value == pytest.approx(0.5)
    assert result.low <= result.difference <= result.high


def test_a_shift_is_found_and_noise_is_not() -> None:
    a = scores(1)
    rng = random.Random(9)
    better = {q: value + 0.05 + 0.05 * rng.random() for q, value in a.items()}
    result = compare_queries(a, better)
    assert result.p_value < 0.001 and 0.05 < result.low < result.difference < result.high < 0.1
    noise = compare_queries(a, scores(2))
    assert noise.p_value > 0.05 and noise.low < 0 < noise.high


def test_swapping_changes_signs_only_and_a_seed_repeats() -> None:
    a, b = scores(3), scores(4, 0.1)
    forth, back = compare_queries(a, b), compare_queries(b, a)
    assert back.difference == -forth.difference
    assert (back.wins, back.losses) == (forth.losses, forth.wins)
    assert back.p_value == pytest.approx(forth.p_value, abs=0.02)
    assert compare_queries(a, b) == forth
    assert compare_queries(a, b, seed=1).low != forth.low


def test_nothing_to_resample() -> None:
    a = scores(5)
    same = compare_queries(a, dict(reversed(a.items())))
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert same.ties == len(a)
    one = compare_queries({"q": 0.25}, {"q": 0.75})
    assert (one.difference, one.low, one.high, one.p_value) == (0.5, 0.5, 0.5, 1.0)


def test_other_queries_are_refused() -> None:
    a = scores(6, count=3)
    with pytest.raises(ValueError, match="1 are only in the first and 2 only in the second of 3"):
        compare_queries(a, {"q0": 1.0, "q1": 1.0, "x": 0.0, "y": 0.0})
    with pytest.raises(ValueError, match="at least one query"):
        compare_queries({}, {})
