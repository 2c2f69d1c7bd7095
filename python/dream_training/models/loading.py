"""Loading the models that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dream_training.config import TrainConfig
from dream_training.distributed.sharding import loaded_whole
from dream_training.known_models import PACKAGED, PACKAGED_MODEL, PACKAGED_RETRIEVER, check_name
from dream_training.models.minilm import minilm_path
from dream_training.models.retriever import build_retriever
from dream_training.models.smollm2 import smollm2_path
from dream_training.models.texts import prepare_retriever
from dream_training.trust import load_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase


def resolve_model(name: str, dtype: str = "auto") -> str:
    """Return the path behind the name of a model: ``smollm2`` and ``minilm`` are packaged ones.

    Raises:
        ModuleNotFoundError: the package is missing; the message names the command that brings it.
    """
    if name == PACKAGED_RETRIEVER:
        return str(minilm_path())
    return str(smollm2_path(dtype)) if name == PACKAGED_MODEL else name


def load_named_tokenizer(name: str, trust_remote_code: bool, what: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by its name, packaged models too.

    Args:
        name: folder or hub name.
        trust_remote_code: run code that comes with it.
        what: the option that names it, for messages.
    """
    return load_tokenizer(resolve_model(name), trust_remote_code, what)


def check_models(config: TrainConfig) -> None:
    """Find wrong names of reader and retriever before anything is loaded or written.

    Raises:
        FileNotFoundError: there is no such model, as far as can be told here.
    """
    for key in ("reader", "retriever"):
        name = getattr(config, key)
        if name not in PACKAGED and not (key == "reader" and config.objective == "infonce"):
            check_name(name, key)


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
