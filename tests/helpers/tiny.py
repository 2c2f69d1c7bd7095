"""A tiny random language model with a byte tokenizer, saved like a real one."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dream_training.config import TrainConfig
from dream_training.data.beir_folder import write_beir_folder
from dream_training.demo.docstrings import RetrievalSplit
from dream_training.models.architectures import byte_tokenizer
from dream_training.reading.reader import Reader


def quiet(width: int = 300) -> Console:
    """A console that keeps its output in ``file``."""
    return Console(file=io.StringIO(), width=width)


# Heads of make_decoder that receive scores.
HEADS = {0: [1], 1: [0, 3], 2: [2]}
WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "rocket", "garden")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that every text survives tokenisation."""
    return byte_tokenizer()


def make_decoder(**changes) -> LlamaForCausalLM:
    """A frozen Llama of three layers, weights large enough for peaked attention."""
    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return model


def in_double(model: torch.nn.Module) -> Any:
    """Make a Llama compute in double precision throughout; its norms would do so in single."""

    def normed(module: Any, states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * states * scale

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(normed, module)  # type: ignore[method-assign]
    return model.double()


def save_decoder(path: Path, **changes) -> Path:
    """Save model and tokenizer for ``from_pretrained``."""
    make_decoder(**changes).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_rows(count: int = 12) -> list[dict]:
    """Training rows in which every document names its own word."""
    return [
        {
            "query": f"Where is the {WORDS[i % len(WORDS)]} {i}?",
            "target": f"{WORDS[i % len(WORDS)]} place {i}",
            "documents": [f"The {WORDS[i % len(WORDS)]} {i} is at {i}."],
            "positive": 0,
        }
        for i in range(count)
    ]


def write_tiny_data(folder: Path, count: int) -> tuple[Path, Path]:
    """Write rows as training data, and a BEIR folder of the first six queries over all of them."""
    rows = make_rows(count)
    data, beir = folder / "train.jsonl", folder / "beir"
    data.write_text("\n".join(map(json.dumps, rows)))
    corpus = {f"d{i}": row["documents"][0] for i, row in enumerate(rows)}
    queries = {f"q{i}": row["query"] for i, row in enumerate(rows[:6])}
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(6)}
    write_beir_folder(beir, corpus, {"test": RetrievalSplit(queries, qrels)})
    return data, beir


def retriever_of(config: TrainConfig):
    """The untrained retriever of a run."""
    from dream_training.models.loading import make_retriever

    return make_retriever(config.retriever, config.lengths, config.run)


def make_config(model: Path, folder: Path, **changes) -> TrainConfig:
    """The config of a tiny model on tiny data, which are written unless their paths are given."""
    if "train_data" not in changes:
        data, beir = write_tiny_data(folder, 24)
        changes = {"train_data": str(data), "eval_data": str(beir), **changes}
    return TrainConfig(
        **{
            "reader": str(model),
            "retriever": str(model),
            "retriever_layers": 2,
            "lora_r": 4,
            "top_k": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "max_steps": 4,
            "eval_steps": 2,
            "log_steps": 1,
            "device": "cpu",
            "output_dir": str(folder / "out"),
            **changes,
        }
    )


def decoder_inputs(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A list that gets the ``input_ids`` of every call of a reader's decoder from now on."""
    seen: list[torch.Tensor] = []
    decoder = reader.model.base_model
    original = decoder.forward

    def forward(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"])
        return original(**inputs)

    monkeypatch.setattr(decoder, "forward", forward)
    return seen
