"""Loading the models that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dream_training.config_groups import LengthsConfig, RetrieverConfig, RunConfig
from dream_training.distributed.sharding import loaded_whole
from dream_training.known_models import PACKAGED, PACKAGED_MODEL, PACKAGED_RETRIEVER, check_name
from dream_training.models.gguf_files import find_gguf, unpacked
from dream_training.models.minilm import minilm_path
from dream_training.models.retriever import build_retriever
from dream_training.models.smollm2 import smollm2_path
from dream_training.models.texts import prepare_retriever
from dream_training.trust import load_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase


def resolve_model(name: str, dtype: str = "auto", what: str = "model") -> str:
    """Return the path of a model by its name: a packaged one, a GGUF file, or any other.

    Args:
        name: ``smollm2``, ``minilm``, a GGUF file or a folder with one, another folder, or a hub
            name.
        dtype: of the weights of a model that is converted.
        what: the option that names it, for messages.

    Raises:
        ModuleNotFoundError: a package is missing; the message names the command that installs it.
        OSError: there is no such file.
        ValueError: a GGUF file cannot be read.
    """
    if name == PACKAGED_RETRIEVER:
        return str(minilm_path())
    return str(smollm2_path(dtype)) if name == PACKAGED_MODEL else unpacked(name, dtype, what)


def load_named_tokenizer(name: str, trust_remote_code: bool, what: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by its name, packaged models too.

    Args:
        name: folder, GGUF file or hub name.
        trust_remote_code: run code that comes with it.
        what: the option that names it, for messages.
    """
    return load_tokenizer(resolve_model(name, what=what), trust_remote_code, what)


def check_models(reader: str | None, retriever: str | None) -> None:
    """Find wrong names of models before anything is loaded or written.

    Args:
        reader: folder, GGUF file or hub name; None where there is none.
        retriever: likewise.

    Raises:
        FileNotFoundError: there is no such model, as far as can be told here.
        ValueError: a GGUF file is none.
    """
    for key, name in (("reader", reader), ("retriever", retriever)):
        if name is not None:
            check_model(name, key)


def check_model(name: str, what: str) -> None:
    """Find a wrong name of a model before anything is loaded; as :func:`check_models`."""
    if name not in PACKAGED and find_gguf(name, what) is None:
        check_name(name, what)


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
            resolve_model(retriever.model, run.dtype, "retriever"),
            layers=retriever.retriever_layers,
            lora_r=retriever.lora_r,
            lora_alpha=retriever.lora_alpha,
            max_len=lengths.passage_max_len,
            dtype=run.dtype,
            device=run.device,
            trust_remote_code=run.trust_remote_code,
        )
    return prepare_retriever(model, retriever, lengths)
