"""Fixtures of the training tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tiny import make_config, save_decoder, write_tiny_data


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random language model with its tokenizer."""
    return save_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """Makes configs on tiny data, with a BEIR folder to evaluate on."""
    data, beir = write_tiny_data(tmp_path, 24)
    return partial(make_config, tiny_model, tmp_path, train_data=str(data), eval_data=str(beir))
