"""Loading the frozen reader that a config names."""

from __future__ import annotations

from typing import Any

import torch

from dream_training.config_groups import LengthsConfig, ReaderConfig, RunConfig
from dream_training.distributed.sharding import loaded_whole
from dream_training.models.loading import resolve_model
from dream_training.reading.reader import Reader
from dream_training.trust import load_model_config


def load_reader(
    reader: ReaderConfig, lengths: LengthsConfig, run: RunConfig, heads: Any, **options: Any
) -> Reader:
    """Load the frozen reader that a config names; ``options`` of :class:`Reader` win."""
    settings: dict[str, Any] = {
        "context": reader.context,
        "mode": reader.mode,
        "document_mass": reader.document_mass,
        "query_max_len": lengths.query_max_len,
        "passage_max_len": lengths.reader_passage_max_len or lengths.passage_max_len,
        "target_max_len": lengths.target_max_len,
        "injected_rows": reader.injected_rows,
        "prompt": reader.reader_prompt,
        "document_store": reader.document_store,
        "document_store_gb": reader.document_store_gb,
        "quantization": reader.reader_quantization,
    }
    device = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sharded = reader.reader_sharding == "sharded"
    with loaded_whole():
        loaded = Reader.from_pretrained(
            resolve_model(reader.model, run.dtype, "reader"),
            heads,
            dtype=run.dtype if run.dtype == "auto" else getattr(torch, run.dtype),
            device="cpu" if sharded else device,
            trust_remote_code=run.trust_remote_code,
            **{**settings, **options},
        )
    return loaded.shard(device) if sharded else loaded


def all_heads(reader: ReaderConfig, run: RunConfig) -> dict[int, list[int]]:
    """Every head of every layer of the reader that a config names."""
    path = resolve_model(reader.model, run.dtype, "reader")
    settings = load_model_config(path, run.trust_remote_code, "reader").get_text_config()
    heads = list(range(settings.num_attention_heads))
    return dict.fromkeys(range(settings.num_hidden_layers), heads)
