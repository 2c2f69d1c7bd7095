"""Loading the models that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dream_training.config import TrainConfig
from dream_training.distributed.sharding import loaded_whole
from dream_training.models.minilm import minilm_path
from dream_training.models.names import PACKAGED, PACKAGED_MODEL, PACKAGED_RETRIEVER, check_name
from dream_training.models.retriever import build_retriever
from dream_training.models.smollm2 import smollm2_path
from dream_training.models.texts import prepare_retriever
from dream_training.models.trust import load_model_config
from dream_training.reading.reader import Reader

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def resolve_model(name: str, dtype: str = "auto") -> str:
    """Return the path behind the name of a model: ``smollm2`` and ``minilm`` are packaged ones.

    Raises:
        ModuleNotFoundError: the package is missing; the message names the command that brings it.
    """
    if name == PACKAGED_RETRIEVER:
        return str(minilm_path())
    return str(smollm2_path(dtype)) if name == PACKAGED_MODEL else name


def check_models(config: TrainConfig) -> None:
    """Find wrong names of reader and retriever before anything is loaded or written.

    Raises:
        FileNotFoundError: there is no such model, as far as can be told here.
    """
    for key in ("reader", "retriever"):
        name = getattr(config, key)
        if name not in PACKAGED and not (key == "reader" and config.objective == "infonce"):
            check_name(name, key)


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


def make_retriever(config: TrainConfig) -> SentenceTransformer:
    """Build the untrained retriever of a config."""
    torch.manual_seed(config.seed)
    with loaded_whole():
        model = build_retriever(
            resolve_model(config.retriever, config.dtype),
            layers=config.retriever_layers,
            lora_r=config.lora_r,
            lora_alpha=config.lora_alpha,
            max_len=config.passage_max_len,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    return prepare_retriever(config, model)
