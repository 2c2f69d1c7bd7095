"""Reader, retriever and one batch for the step suite."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dream_training import DreamCollator, Reader
from dream_training.models.architectures import byte_tokenizer
from dream_training.models.retriever import build_retriever
from dream_training.models.smollm2 import smollm2_path

QUERY_TOKENS, TARGET_TOKENS = 32, 32
_LORA_RANK = 32
# The optimiser does its full work and changes nothing, so every run computes the same step.
_LEARNING_RATE = 0.0


@dataclass(frozen=True)
class StepModel:
    """A reader and the retriever made of its first layers.

    Attributes:
        name: in tables and records.
        shape: of a Llama with random weights; None for the packaged SmolLM2.
        retriever_layers: None for all.
        heads: of the reader that receive the scores; None spreads 16 over its later half.
    """

    name: str
    shape: Mapping[str, int] | None = None
    retriever_layers: int | None = None
    heads: Mapping[int, Sequence[int]] | None = None


def _shape(*sizes: int) -> dict[str, int]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size",
    )  # fmt: skip
    return dict(zip(names, sizes, strict=True))


STEP_MODELS = {
    model.name: model
    for model in (
        StepModel(
            "smollm2-135m",
            retriever_layers=10,
            # What `dream heads` selects with the documentation that `dream demo` trains on.
            heads={
                2: [4], 5: [6], 8: [0, 1], 9: [2], 14: [3], 15: [6, 7], 17: [3, 4, 5], 18: [6],
                20: [3], 21: [8], 22: [4], 23: [2],
            },
        ),
        StepModel("qwen2.5-0.5b-shaped", _shape(896, 4864, 24, 14, 2, 64, 151936)),
        StepModel("llama-3.2-1b-shaped", _shape(2048, 8192, 16, 32, 8, 64, 128256)),
        StepModel("llama-3.2-3b-shaped", _shape(3072, 8192, 28, 24, 8, 128, 128256)),
        StepModel("tiny", _shape(64, 128, 4, 4, 2, 16, 512), retriever_layers=2),
    )
}  # fmt: skip


@dataclass
class StepSetup:
    """Everything that one training step needs.

    Attributes:
        reader: frozen, injected.
        retriever: with LoRA adapters.
        collator: tokenises for the retriever.
        optimizer: of the adapters.
        rows: of the batch: query, target, documents.
        temperature: divides the cosines.
    """

    reader: Reader
    retriever: Any
    collator: DreamCollator
    optimizer: torch.optim.Optimizer
    rows: list[dict[str, Any]]
    temperature: float = 0.05
    folder: Any = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.reader.device

    @property
    def queries(self) -> list[str]:
        return [row["query"] for row in self.rows]

    @property
    def targets(self) -> list[str]:
        return [row["target"] for row in self.rows]

    @property
    def documents(self) -> list[str]:
        """The pool of the batch."""
        return list(dict.fromkeys(text for row in self.rows for text in row["documents"]))

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.retriever.parameters() if p.requires_grad]


def make_setup(
    model: StepModel, batch: int, document_tokens: int, device: torch.device
) -> StepSetup:
    """Build models and batch; the packaged model in the faster dtype of this machine."""
    folder, path = _path_of(model)
    reader = _load_reader(path, model, document_tokens, device, "joint")
    torch.manual_seed(0)
    retriever = build_retriever(
        path, layers=model.retriever_layers, lora_r=_LORA_RANK, max_len=document_tokens,
        device=str(device),
    )  # fmt: skip
    _checkpoint(retriever.transformers_model)
    for name, parameter in retriever.named_parameters():
        if "lora_B" in name:
            # Adapters start as zeros, and so does half of their gradient.
            nn.init.normal_(parameter, std=0.02)
    setup = StepSetup(
        reader=reader,
        retriever=retriever.train(),
        collator=DreamCollator(retriever, QUERY_TOKENS, document_tokens),
        optimizer=torch.optim.AdamW(
            [p for p in retriever.parameters() if p.requires_grad], lr=_LEARNING_RATE
        ),
        rows=make_rows(batch),
        folder=folder,
    )
    return setup


def load_step_reader(
    model: StepModel, document_tokens: int, device: torch.device, context: str
) -> Reader:
    """Load the reader alone."""
    folder, path = _path_of(model)
    reader = _load_reader(path, model, document_tokens, device, context)
    if folder is not None:
        folder.cleanup()
    return reader


def _path_of(model: StepModel) -> tuple[tempfile.TemporaryDirectory[str] | None, Path]:
    """The folder of a model, and what deletes it where it is temporary."""
    if model.shape is None:
        return None, Path(smollm2_path("auto"))
    folder = tempfile.TemporaryDirectory()
    save_random_model(model.shape, Path(folder.name))
    return folder, Path(folder.name)


def _load_reader(
    path: Path, model: StepModel, document_tokens: int, device: torch.device, context: str
) -> Reader:
    heads = model.heads or spread_heads(model.shape or {})
    return Reader.from_pretrained(
        path, heads, device=device, context=context, query_max_len=QUERY_TOKENS,
        passage_max_len=document_tokens, target_max_len=TARGET_TOKENS,
    )  # fmt: skip


def _checkpoint(backbone: Any) -> None:
    """Checkpoint the retriever's activations, which would be most of a step's memory."""
    # renamed in transformers 5.24
    new = getattr(backbone, "activation_checkpointing_enable", None)
    (new or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def make_rows(count: int) -> list[dict[str, Any]]:
    """A batch that every installation has: the docstrings of ``torch.nn``'s classes."""
    rows = []
    for name in sorted(vars(nn)):
        text = " ".join((inspect.getdoc(getattr(nn, name)) or "").split())
        if isinstance(getattr(nn, name), type) and len(text) > 1000:
            document = f"{name}: {text}"  # also the first few tokens differ
            query = f"What does torch.nn.{name} compute, and with which arguments is it made?"
            rows.append({"query": query, "target": text[:400], "documents": [document]})
    if len(rows) < count:
        raise ValueError(f"batch must be at most {len(rows)}, got {count}")
    return rows[:count]


def spread_heads(shape: Mapping[str, int], count: int = 16) -> dict[int, list[int]]:
    """Heads over the later half of the layers, where retrieval heads are found."""
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    first = layers // 2
    chosen: dict[int, list[int]] = {}
    for i in range(min(count, (layers - first) * heads)):
        layer = first + i % (layers - first)
        head = (7 * i) % heads
        if head not in chosen.setdefault(layer, []):
            chosen[layer].append(head)
    return chosen


def save_random_model(shape: Mapping[str, int], path: Path) -> None:
    """Save a Llama of this shape with random bfloat16 weights and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = dict(shape)
    config = LlamaConfig(
        **options, max_position_embeddings=65536, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
