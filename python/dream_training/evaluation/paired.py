"""Paired tests: is one retriever better than another on the same queries, or by chance?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 9999
# Rounding error of a sum of discounts; a real difference in nDCG@10 is larger.
_TIE = 1e-9


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of ``b`` with ``a``.

    Attributes:
        queries: number of queries.
        mean_a: mean of ``a``.
        mean_b: mean of ``b``.
        difference: mean of ``b - a`` over the queries.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
        p_value: of a two-sided paired permutation test.
        wins: queries on which ``b`` is better.
        ties: queries on which both are equal.
        losses: queries on which ``a`` is better.
    """

    queries: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


def compare_queries(a: Mapping[str, float], b: Mapping[str, float], seed: int = 0) -> Comparison:
    """Compare two retrievers by their score on each of the same queries.

    The interval is the percentile bootstrap's over queries, and the p value that of the permutation
    test which swaps the two scores of a query (Smucker, Allan & Carterette, CIKM 2007), both by
    ``scipy`` with 9,999 resamples: they describe the variation over queries of the same kind, not
    over training seeds.

    Args:
        a: score by query id.
        b: score by query id, of the same queries.
        seed: of the resampling.

    Raises:
        ValueError: there is no query, or the two have different ones.
    """
    _check_queries(a, b)
    queries = sorted(a)
    x, y = (np.array([scores[q] for q in queries], dtype=float) for scores in (a, b))
    difference = y - x
    difference[np.abs(difference) < _TIE] = 0.0
    low, high = bootstrap_interval(difference, seed)
    p_value = 1.0
    # Swapping a single pair gives nothing more extreme than the observed difference.
    if len(queries) > 1 and difference.any():
        from scipy import stats

        p_value = float(
            stats.permutation_test(
                (difference, np.zeros_like(difference)), _mean_difference,
                permutation_type="samples", n_resamples=_RESAMPLES, vectorized=True, batch=256,
                random_state=np.random.default_rng(seed),
            ).pvalue
        )  # fmt: skip
    return Comparison(
        queries=len(queries),
        mean_a=float(x.mean()),
        mean_b=float(y.mean()),
        difference=float(difference.mean()),
        low=low,
        high=high,
        p_value=p_value,
        wins=int((difference > 0).sum()),
        ties=int((difference == 0).sum()),
        losses=int((difference < 0).sum()),
    )


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean over queries, by the percentile bootstrap.

    Args:
        values: one for each query, at least one.
        seed: of the resampling.
    """
    from scipy import stats

    values = np.asarray(values, dtype=float)
    # Equal values have no spread to resample; scipy refuses or warns.
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, confidence_level=0.95,
        method="percentile", batch=256, random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def _mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis=axis) - y.mean(axis=axis)


def _check_queries(a: Mapping[str, float], b: Mapping[str, float]) -> None:
    if not a or not b:
        raise ValueError("a comparison needs at least one query")
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        examples = ", ".join(repr(q) for q in (only_a + only_b)[:3])
        raise ValueError(
            f"the queries differ: {len(only_a)} are only in the first and {len(only_b)} only in "
            f"the second of {len(a)} and {len(b)}, such as {examples}"
        )


def describe_p(value: float) -> str:
    """A p value as text; below the resolution of the resamples, only an upper bound."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
