"""Averages of a run's first and last weights."""

from __future__ import annotations

import pytest
import torch

from dream_training.models.averaging import average_weights, averaged, copy_weights


def test_weights_are_averaged_permanently_or_temporarily() -> None:
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    start = copy_weights(model)
    assert list(start) == ["weight"]
    before, bias = start["weight"].clone(), model.bias.clone()
    model.weight.data += torch.tensor([[1.0, -2.0]])
    after = model.weight.detach().clone()
    with averaged(model, start, 0.25):
        torch.testing.assert_close(model.weight.data, before + torch.tensor([[0.25, -0.5]]))
    assert torch.equal(model.weight, after)
    with pytest.raises(KeyError), averaged(model, start, 0.5):
        raise KeyError
    assert torch.equal(model.weight, after)
    average_weights(model, start, 0.5)
    torch.testing.assert_close(model.weight.data, before + torch.tensor([[0.5, -1.0]]))
    assert torch.equal(model.bias, bias) and torch.equal(start["weight"], before)
    with pytest.raises(ValueError, match=r"share must lie in 0 \.\. 1, got 1.5"):
        average_weights(model, start, 1.5)
