"""Averages of a run's first and last weights."""

from __future__ import annotations

import pytest
import torch

from dream_training.models.averaging import Averaging


def test_weights_are_averaged_permanently_or_temporarily() -> None:
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    quarter, half = Averaging(model, 0.25), Averaging(model, 0.5)
    before, bias = model.weight.detach().clone(), model.bias.clone()
    model.weight.data += torch.tensor([[1.0, -2.0]])
    after = model.weight.detach().clone()
    with quarter.applied():
        torch.testing.assert_close(model.weight.data, before + torch.tensor([[0.25, -0.5]]))
    assert torch.equal(model.weight, after)
    with pytest.raises(KeyError), half.applied():
        raise KeyError
    assert torch.equal(model.weight, after)
    half.settle()
    torch.testing.assert_close(model.weight.data, before + torch.tensor([[0.5, -1.0]]))
    assert torch.equal(model.bias, bias)
    whole, averaged = Averaging(model, 1.0), model.weight.detach().clone()
    model.weight.data += 1.0
    with whole.applied():
        assert torch.equal(model.weight, averaged + 1.0)
    with pytest.raises(ValueError, match=r"share must lie in 0 \.\. 1, got 1.5"):
        Averaging(model, 1.5)


def test_a_share_of_an_adapter_is_that_share_of_its_update() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("lora_A", "lora_B")})
    torch.nn.init.zeros_(model["lora_B"].weight)
    half = Averaging(torch.nn.ModuleDict({"layer": model}), 0.5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight)
    update = model["lora_B"].weight @ model["lora_A"].weight
    with half.applied():
        torch.testing.assert_close(model["lora_B"].weight @ model["lora_A"].weight, update / 2)
