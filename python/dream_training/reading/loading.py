"""Loading the frozen reader that a config names."""

from __future__ import annotations

from typing import Any

import torch

from dream_training.config import TrainConfig
from dream_training.distributed.sharding import loaded_whole
from dream_training.models.loading import resolve_model
from dream_training.reading.reader import Reader
from dream_training.trust import load_model_config


def load_reader(config: TrainConfig, heads: Any, **options: Any) -> Reader:
    """Load the frozen reader that a config names; ``options`` of :class:`Reader` win."""
    settings: dict[str, Any] = {
        "context": config.context,
        "mode": config.mode,
        "document_mass": config.document_mass,
        "query_max_len": config.query_max_len,
        "passage_max_len": config.reader_passage_max_len or config.passage_max_len,
        "target_max_len": config.target_max_len,
        "injected_rows": config.injected_rows,
        "prompt": config.reader_prompt,
        "document_store": config.document_store,
        "document_store_gb": config.document_store_gb,
    }
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sharded = config.reader_sharding == "sharded"
    with loaded_whole():
        reader = Reader.from_pretrained(
            resolve_model(config.reader, config.dtype),
            heads,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            device="cpu" if sharded else device,
            trust_remote_code=config.trust_remote_code,
            **{**settings, **options},
        )
    return reader.shard(device) if sharded else reader


def all_heads(config: TrainConfig) -> dict[int, list[int]]:
    """Every head of every layer of the reader that a config names."""
    path = resolve_model(config.reader, config.dtype)
    settings = load_model_config(path, config.trust_remote_code, "reader").get_text_config()
    heads = list(range(settings.num_attention_heads))
    return dict.fromkeys(range(settings.num_hidden_layers), heads)
