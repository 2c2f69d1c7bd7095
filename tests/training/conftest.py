"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_decoder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random language model with its tokenizer."""
    return save_decoder(tmp_path_factory.mktemp("models") / "tiny")
