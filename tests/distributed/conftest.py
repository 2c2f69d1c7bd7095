"""Processes and models that the tests of training in several processes share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # tiny models are made there

from tiny import save_decoder

from processes import Processes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random language model with its tokenizer."""
    return str(save_decoder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes that wait for cases."""
    processes = Processes(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.close()
