"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_decoder, write_tiny_data

from dream_training.config import TrainConfig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random language model with its tokenizer."""
    return save_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """A config on tiny data, with a BEIR folder to evaluate on."""
    data, beir = write_tiny_data(tmp_path, 24)

    def make(**changes) -> TrainConfig:
        return TrainConfig(
            **{
                "reader": str(tiny_model),
                "retriever": str(tiny_model),
                "retriever_layers": 2,
                "lora_r": 4,
                "train_data": str(data),
                "eval_data": str(beir),
                "top_k": 4,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "warmup_steps": 1,
                "max_steps": 4,
                "eval_steps": 2,
                "log_steps": 1,
                "device": "cpu",
                "output_dir": str(tmp_path / "out"),
                **changes,
            }
        )

    return make
