"""Fixtures of the training tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_rows, save_decoder

from dream_training.config import TrainConfig
from dream_training.data.beir_folder import write_beir_folder
from dream_training.data.docstrings import RetrievalSplit


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random language model with its tokenizer."""
    return save_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """A config on tiny data, with a BEIR folder to evaluate on."""
    rows = make_rows(24)
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    corpus = {f"d{i}": row["documents"][0] for i, row in enumerate(rows)}
    queries = {f"q{i}": row["query"] for i, row in enumerate(rows[:6])}
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(6)}
    write_beir_folder(tmp_path / "beir", corpus, {"test": RetrievalSplit(queries, qrels)})

    def make(**changes) -> TrainConfig:
        return TrainConfig(
            **{
                "reader": str(tiny_model),
                "retriever": str(tiny_model),
                "retriever_layers": 2,
                "lora_r": 4,
                "train_data": str(data),
                "eval_data": str(tmp_path / "beir"),
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
