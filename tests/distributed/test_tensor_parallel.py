"""Heads that are split over processes: refused, since each process counts its own from 0."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    "by, message",
    [
        ("transformers", "cannot be injected: its heads are split over 2 processes"),
        ("torch", "layer 1 must have the 4 heads of the model's config, got 2: tensor parallelism"),
    ],
)
def test_tensor_parallelism_is_refused_in_every_process(two, folder, by: str, message: str) -> None:
    for equal, error in two.run("tensor_parallel", folder, by):
        assert equal, "the plain model is right"
        assert message in error
