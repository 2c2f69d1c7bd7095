"""Bad input is refused with the argument, the expected and the actual value."""

from __future__ import annotations

import pytest
import torch

from dream_kernels import document_attention, document_mass, explain, set_value_checks
from helpers.cases import Case, make_inputs


def _call(**changes):
    inputs = make_inputs(Case("validation", prefix=4, local=20), torch.float32)
    arguments = {
        **{name: inputs.tensors[name] for name in ("query", "key", "value", "scores")},
        "prefix": (inputs.tensors["prefix_key"], inputs.tensors["prefix_value"]),
        "spans": inputs.spans,
    }
    arguments.update(changes)
    return document_attention(**arguments)


SPANS = torch.tensor([[[2, 7], [7, 12], [14, 17]]]).expand(2, -1, -1)


def _spans(first: list[int], second: list[int]) -> torch.Tensor:
    return torch.tensor([[[2, 7], [7, 12], [14, 17]], [first, second, [14, 17]]])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"spans": _spans([2, 8], [7, 12])}, ValueError, r"disjoint.*spans\[1, 0\] = \[2, 8\]"),
        ({"spans": _spans([7, 12], [2, 8])}, ValueError, r"disjoint.*spans\[1, 1\] = \[2, 8\]"),
        ({"spans": _spans([-1, 3], [7, 12])}, ValueError, r"spans\[1, 0\] = \[-1, 3\]"),
        ({"spans": _spans([5, 3], [7, 12])}, ValueError, r"spans\[1, 0\] = \[5, 3\]"),
        ({"spans": _spans([2, 7], [20, 25])}, ValueError, r"end <= 24.*\[20, 25\]"),
        ({"spans": SPANS[:, :0]}, ValueError, "C >= 1"),
        ({"spans": SPANS.float()}, TypeError, "spans must be int32 or int64"),
        ({"spans": SPANS[:1]}, ValueError, r"spans must have shape \[B, C, 2\] with B = 2"),
        ({"spans": [[2, 7]]}, TypeError, "spans must be a torch.Tensor, got list"),
        ({"scores": torch.zeros(2, 4)}, ValueError, r"scores must have shape.*got \[2, 4\]"),
        ({"scores": torch.zeros(2, 3).long()}, TypeError, "scores must be floating point"),
        ({"scores": torch.full((2, 3), torch.nan)}, ValueError, "scores must not be NaN"),
        ({"scores": torch.full((2, 3), torch.inf)}, ValueError, r"\+inf, got inf at \[0, 0\]"),
        ({"query": torch.zeros(2, 6, 16)}, ValueError, r"query must have shape \[B, Hq, M, D\]"),
        ({"query": torch.zeros(2, 6, 5, 16).int()}, TypeError, "query must be floating point"),
        ({"query": torch.zeros(2, 5, 5, 16)}, ValueError, "divides query's 5, got 2"),
        ({"query": torch.zeros(2, 6, 5, 8)}, ValueError, "query's head size 8"),
        ({"query": torch.zeros(2, 0, 5, 16)}, ValueError, "heads and a head size"),
        ({"key": torch.zeros(2, 2, 20, 16).double()}, TypeError, "key must have query's dtype"),
        ({"key": torch.zeros(2, 2, 19, 16)}, ValueError, r"value must have key's shape"),
        ({"value": torch.zeros(3, 2, 20, 16)}, ValueError, "value must have key's shape"),
        ({"value": torch.zeros(2, 2, 20, 8)}, ValueError, "must have value's head size 8"),
        ({"value": torch.zeros(2, 2, 20, 0)}, ValueError, r"got \[2, 2, 20, 0\]"),
        ({"prefix": torch.zeros(1)}, TypeError, r"prefix must be a \(key, value\) pair"),
        ({"prefix": (torch.zeros(3, 2, 4, 16),) * 2}, ValueError, "batch 1 or 2"),
        ({"prefix": (torch.zeros(1, 3, 4, 16),) * 2}, ValueError, r"prefix must have key's 2"),
        ({"mode": "add"}, ValueError, "mode must be one of 'reweight', 'bias', got 'add'"),
        ({"heads": (0, 6)}, ValueError, r"heads must lie in 0 \.\. 5, got 6"),
        ({"heads": (-1,)}, ValueError, "got -1"),
        ({"heads": (1, 1)}, ValueError, "once, got 1 twice"),
        ({"heads": (1.5,)}, TypeError, "heads must be integers or bools, got float"),
        ({"heads": [True, False]}, ValueError, "heads as bool must have length 6, got 2"),
        ({"document_mass": 0.0}, ValueError, r"document_mass must lie in \(0, 1\], got 0.0"),
        ({"document_mass": 1.5}, ValueError, "got 1.5"),
        ({"document_mass": "all"}, TypeError, "document_mass must be a float, got str"),
        ({"document_mass": 0.5, "mode": "bias"}, ValueError, "needs mode='reweight'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"attention_mask": torch.ones(2, 20).long()}, ValueError, r"\[2, 24\], got \[2, 20\]"),
        ({"attention_mask": torch.ones(2, 24)}, TypeError, "attention_mask must be bool"),
        ({"window": 5}, ValueError, r"window 5: .* 0 row 4, at position 23, is 21 .* 0$"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 24.0}, TypeError, "window must be an integer or None, got float"),
        ({"window": 24, "causal": False}, ValueError, "window needs causal=True"),
        ({"window": 24, "positions": torch.arange(24)}, ValueError, r"\[2, 24\], got \[24\]"),
        ({"positions": torch.zeros(2, 24)}, TypeError, "positions must be int32 or int64"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"softcap": "yes"}, TypeError, "softcap must be a float or None, got str"),
        ({"sinks": torch.zeros(5)}, ValueError, r"sinks must have shape \[Hq\] = \[6\], got \[5\]"),
        ({"sinks": torch.zeros(6).long()}, TypeError, "sinks must be floating point"),
        ({"sinks": torch.full((6,), torch.nan)}, ValueError, "sinks must not be NaN"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', .*got 'fast'"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict, error: type[Exception], message: str) -> None:
    _call()
    with pytest.raises(error, match=message):
        _call(**changes)


def test_value_checks_can_be_turned_off_and_on() -> None:
    scores = torch.full((2, 3), torch.nan)
    try:
        set_value_checks(False)
        _call(scores=scores)
        set_value_checks(True)
        with pytest.raises(ValueError, match="NaN"):
            _call(scores=scores)
    finally:
        set_value_checks(None)


def test_value_checks_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAM_KERNELS_CHECK", "0")
    _call(scores=torch.full((2, 3), torch.nan))


def test_document_mass_and_explain_check_their_arguments() -> None:
    with pytest.raises(ValueError, match="disjoint"):
        document_mass(
            torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 9, 4), torch.tensor([[[0, 4], [2, 6]]])
        )
    with pytest.raises(ValueError, match="impl must be one of"):
        explain(
            torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4),
            torch.zeros(1, 1), torch.tensor([[[0, 4]]]), impl="fast",
        )  # fmt: skip


def test_a_window_is_long_enough_by_position() -> None:
    """Documents that were read alone are as near as their positions say."""
    positions = torch.tensor([*range(7), *range(2, 7), 7, 8, *range(2, 5), *range(9, 16)])
    positions = positions.expand(2, -1)
    _call(window=14, positions=positions, impl="reference")
    with pytest.raises(ValueError, match=r"got window 13: .* is 13 positions after key 2"):
        _call(window=13, positions=positions)
    # Neither plain heads nor absent documents need a window.
    _call(window=1, heads=(), impl="reference")
    _call(window=1, spans=torch.zeros(2, 3, 2).long(), impl="reference")
    # What is padding is not missed.
    padded = torch.ones(2, 24)
    padded[:, :12] = 0
    _call(window=10, attention_mask=padded.long(), impl="reference")


def test_empty_prefix_is_no_prefix() -> None:
    inputs = make_inputs(Case("empty_prefix"), torch.float32)
    empty = inputs.tensors["key"][:1, :, :0]
    with_prefix = inputs.call(document_attention)
    inputs.tensors["prefix_key"] = inputs.tensors["prefix_value"] = empty
    assert torch.equal(inputs.call(document_attention), with_prefix)
