"""The state that training resumes from: weights, optimiser and random generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dream_training.checkpointing.folder import CheckpointError

_BETWEEN = "::"  # separates the name of a parameter from that of its optimiser state
# Sharded tensors are gathered, on the CPU; frozen ones are left out.
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def trained_weights(loss: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters and buffers of the retriever and the objective, on the CPU.

    Sharded ones are gathered on process 0 alone: every process must call this.

    Args:
        loss: the objective, which holds the retriever.
    """
    return {
        name: value.clone()
        for name, value in _own(get_model_state_dict(loss, options=_OPTIONS)).items()
    }


def _own(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors without those of the reader, which is frozen."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.startswith("reader.")
    }


def restore_weights(loss: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Restore what :func:`trained_weights` returned.

    Raises:
        CheckpointError: the weights belong to another retriever.
    """
    here = get_model_state_dict(loss, options=StateDictOptions(ignore_frozen_params=True))
    now = _own(here)
    for name in sorted(now.keys() ^ weights.keys()):
        where = "the checkpoint" if name in weights else "the retriever of this run"
        raise CheckpointError(f"only {where} has the weight {name!r}")
    for name, value in now.items():
        if value.shape != weights[name].shape:
            raise CheckpointError(
                f"the weight {name!r} must have the shape {list(value.shape)}, "
                f"got {list(weights[name].shape)}"
            )
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    set_model_state_dict(loss, dict(weights), options=options)


def optimizer_state(
    loss: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimiser: tensors by name, and what JSON can hold."""
    state: Any = get_optimizer_state_dict(loss, optimizer, options=_OPTIONS)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    # If weights are gathered, only process 0 has them.
    for parameter, kept in state.get("state", {}).items():
        for name, value in kept.items():
            group = tensors if isinstance(value, Tensor) else numbers
            group[f"{parameter}{_BETWEEN}{name}"] = value
    return tensors, {"numbers": numbers, "groups": state.get("param_groups", [])}


def restore_optimizer(
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
) -> None:
    """Restore what :func:`optimizer_state` returned."""
    state: dict[str, dict[str, Any]] = {}
    for key, value in {**content["numbers"], **tensors}.items():
        parameter, name = key.rsplit(_BETWEEN, 1)
        state.setdefault(parameter, {})[name] = value
    groups = [
        # JSON has no tuples, and the optimiser's pair of decay rates was one.
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in content["groups"]
    ]
    whole: Any = {"state": state, "param_groups": groups}
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    set_optimizer_state_dict(loss, optimizer, whole, options=options)


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's generators, GPUs included, for JSON."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    version, internal, gauss = random.getstate()
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in accelerators],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(own, dtype=torch.uint8), device)
