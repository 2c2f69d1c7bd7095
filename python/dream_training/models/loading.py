"""Loading the models that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dream_training.config_groups import LengthsConfig, RetrieverConfig, RunConfig
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
    """Return the path of a model by its name: ``smollm2`` and ``minilm`` are packaged ones.

    Raises:
        ModuleNotFoundError: the package is missing; the message names the command that installs it.
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


def check_models(reader: str | None, retriever: str) -> None:
    """Find wrong names of models before anything is loaded or written.

    Args:
        reader: folder or hub name; None where the objective needs no reader.
        retriever: folder or hub name.

    Raises:
        FileNotFoundError: there is no such model, as far as can be told here.
    """
    for key, name in (("reader", reader), ("retriever", retriever)):
        if name is not None and name not in PACKAGED:
            check_name(name, key)


def prepared_retriever(
    model: SentenceTransformer | None,
    retriever: RetrieverConfig,
    lengths: LengthsConfig,
    run: RunConfig,
) -> SentenceTransformer:
    """Give a model the lengths and prompts of a config; build a new one if it is None."""
    if model is None:
        return make_retriever(retriever, lengths, run)
    return prepare_retriever(model, retriever, lengths)


def make_retriever(
    retriever: RetrieverConfig, lengths: LengthsConfig, run: RunConfig
) -> SentenceTransformer:
    """Build the untrained retriever of a config."""
    torch.manual_seed(run.seed)
    with loaded_whole():
        model = build_retriever(
            resolve_model(retriever.model, run.dtype),
            layers=retriever.retriever_layers,
            lora_r=retriever.lora_r,
            lora_alpha=retriever.lora_alpha,
            max_len=lengths.passage_max_len,
            dtype=run.dtype,
            device=run.device,
            trust_remote_code=run.trust_remote_code,
        )
    return prepare_retriever(model, retriever, lengths)
