"""Fixtures for every test."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# No test may contact a model hub: real models come from installed packages.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
import pytest
import torch

from helpers.process_state import kept

# Without a GPU the Triton kernels run in triton's interpreter, which must be requested
# before triton is imported. It is used only where a test names impl="triton".
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# When first used as a context, torch.device("meta") records which functions make tensors; were they
# poisoned by then, it would not intercept the original ones.
with torch.device("meta"):
    torch.empty(0)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    return tensor


@pytest.fixture(autouse=True)
def poisoned_empty(test_keeps_the_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill ``torch.empty`` with NaN, so that an unwritten element shows.

    The check of the process's state is set up first, so that it runs after all patches are undone.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            return _poison(_original(*args, **kwargs))

        monkeypatch.setattr(torch, name, poisoned)
    for name in ("new_empty", "new_empty_strided"):
        original = getattr(torch.Tensor, name)

        def poisoned_method(self, *args, _original=original, **kwargs):
            return _poison(_original(self, *args, **kwargs))

        monkeypatch.setattr(torch.Tensor, name, poisoned_method)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes seconds begins first, so that no process of several works alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Freeze what the imports made, so that the collections that trainers force skip it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def module_keeps_the_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module's fixtures change is restored after its last test."""
    with kept(request.node.nodeid):
        yield


@pytest.fixture(autouse=True)
def test_keeps_the_process(
    module_keeps_the_process: None, request: pytest.FixtureRequest
) -> Iterator[None]:
    with kept(request.node.nodeid):
        yield


@pytest.fixture(scope="session")
def nq_oracle() -> Path:
    """The real test set in BEIR layout, if it is next to the checkout."""
    path = SHARED_DATA / "nq_oracle"
    if not path.is_dir():
        pytest.skip(f"{path} is not present")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random language model with its tokenizer."""
    from helpers.tiny import save_decoder

    return save_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes configs on tiny data, with a BEIR folder to evaluate on."""
    from helpers.tiny import make_config, write_tiny_data

    data, beir = write_tiny_data(tmp_path, 24)
    return partial(make_config, tiny_model, tmp_path, train_data=str(data), eval_data=str(beir))
