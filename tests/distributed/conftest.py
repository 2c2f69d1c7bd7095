"""Processes and models shared by the tests of training in several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.processes import Processes
from helpers.tiny import save_decoder


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
