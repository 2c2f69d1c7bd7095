"""Shapes of the models that the recipes name, and tiny models of the same architecture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_training.known_models import KNOWN
from dream_training.trust import load_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TINY_LAYERS, _TINY_HEAD_DIM, _TINY_VOCABULARY = 4, 16, 512


def model_config(
    name: str, *, trust_remote_code: bool = False, what: str = "model"
) -> PretrainedConfig:
    """Return the configuration of a decoder: of a folder, a model known here, or the hub's.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
    """
    from transformers import AutoConfig

    if not Path(name).is_dir() and name in KNOWN:
        shape: dict[str, Any] = dict(KNOWN[name])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    return load_model_config(name, trust_remote_code, what).get_text_config()


def parameter_count(config: PretrainedConfig, layers: int | None = None) -> dict[str, int]:
    """Count a decoder's weights without allocating them.

    Args:
        config: of the model.
        layers: count only so many; None for all.

    Returns:
        ``decoder`` (the weights applied to every token), ``embedding`` and ``head`` (0 if tied).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dream_kernels.injection.support import backbone_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    tied = bool(config.tie_word_embeddings)
    decoder = sum(p.numel() for p in backbone_of(model).parameters()) - embedding
    if layers is not None:
        decoder = decoder * min(layers, config.num_hidden_layers) // config.num_hidden_layers
    return {"decoder": decoder, "embedding": embedding, "head": 0 if tied else head}


def save_tiny(config: PretrainedConfig, path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Save a tiny model of the same architecture, with random weights and a byte tokenizer.

    The ratio of query to key heads is kept; everything else shrinks.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    group = config.num_attention_heads // key_heads
    heads = 2 * group
    shape: dict[str, Any] = {
        "vocab_size": _TINY_VOCABULARY,
        "hidden_size": heads * _TINY_HEAD_DIM,
        "intermediate_size": 2 * heads * _TINY_HEAD_DIM,
        "num_hidden_layers": min(_TINY_LAYERS, config.num_hidden_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": _TINY_HEAD_DIM,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model_type, **shape))
    path = Path(path)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte, so that every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {symbol: i for i, symbol in enumerate(symbols, len(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
