"""What a training run will cost: counted weights, tokens, operations and bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dream_training.models.architectures import model_config, parameter_count
from dream_training.models.loading import resolve_model

if TYPE_CHECKING:
    from dream_training.config import TrainConfig

# Of the rate of a large matrix product, what a whole step reached on a CPU: a tera-operation in
# 5.9 s at 387 giga-operations a second (``python -m benchmarks step``, one pool for the batch).
STEP_SHARE = 0.45
# Dense bfloat16 rate in the data sheet, for the column of a device that is not here.
H100_PEAK = 989e12
_PROMPT_TOKENS = 12
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_OPTIMIZER_BYTES = 4 + 4 + 4 + 4  # weight, gradient, two moments, all in float32


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        reader_weights: parameters of the reader.
        retriever_weights: parameters of the retriever's backbone.
        trained_weights: parameters that the optimiser changes.
        documents: documents in a batch's pool, at most.
        read_tokens: document tokens that the reader reads in a batch, at most.
        suffix_tokens: tokens of queries, prompts and targets in a batch, at most.
        encoded_tokens: tokens that the retriever encodes in a batch, at most.
        operations: floating-point operations of a step in matrix products, attention left out.
        weight_bytes: of both models, adapters and optimiser.
        prefix_bytes: keys and values of the documents.
        activation_bytes: of the retriever's backward, the larger one.
        steps: of the run.
    """

    reader_weights: int
    retriever_weights: int
    trained_weights: int
    documents: int
    read_tokens: int
    suffix_tokens: int
    encoded_tokens: int
    operations: float
    weight_bytes: int
    prefix_bytes: int
    activation_bytes: int
    steps: int

    @property
    def memory_bytes(self) -> int:
        """What is in memory at once, at the peak."""
        return self.weight_bytes + self.prefix_bytes + self.activation_bytes

    def seconds(self, rate: float) -> float:
        """Duration of the steps at ``rate`` operations a second, evaluations left out."""
        return self.steps * self.operations / rate


def make_plan(config: TrainConfig, documents_per_row: int = 1) -> Plan:
    """Count what a run of ``config`` will take.

    A token costs ``2 P`` operations forward, ``P`` being the weights that multiply it; backward
    ``2 P`` for the gradient of the activations, and no more: weights are frozen in the reader,
    and adapters are small in the retriever. With mini-batches the retriever runs forward twice and
    keeps the activations of one of them.

    Args:
        config: the run.
        documents_per_row: candidates that a line of the data has.

    Raises:
        OSError: a model's configuration cannot be found.
    """
    reader = shape_of(config, config.reader)
    retriever = shape_of(config, config.retriever)
    own = parameter_count(reader)
    head = reader.vocab_size * reader.hidden_size
    backbone = parameter_count(retriever, config.retriever_layers)
    layers = min(config.retriever_layers or 10**6, retriever.num_hidden_layers)
    if config.pool == "in_batch":
        documents_per_row = 1
    elif config.documents_per_query is not None:
        documents_per_row = min(documents_per_row, config.documents_per_query)
    documents = config.batch_size * documents_per_row
    read = documents * (config.reader_passage_max_len or config.passage_max_len)
    targets = config.batch_size * config.target_max_len
    suffix = config.batch_size * (config.query_max_len + _PROMPT_TOKENS) + targets
    encoded = documents * config.passage_max_len + config.batch_size * config.query_max_len
    operations = 2.0 * own["decoder"] * (read + 2 * suffix) + 4.0 * head * targets
    operations += 4.0 * backbone["decoder"] * encoded
    kept = encoded
    if config.mini_batch_size is not None:
        operations += 2.0 * backbone["decoder"] * encoded
        kept = min(encoded, config.mini_batch_size * config.passage_max_len)
    if config.lora_r:
        trained = _adapter_weights(retriever, layers, config.lora_r)
    else:
        trained = backbone["decoder"] + backbone["embedding"]
        operations += 2.0 * backbone["decoder"] * encoded
    operations *= config.gradient_accumulation_steps
    size = _BYTES.get(config.dtype, 2)
    key_heads = getattr(reader, "num_key_value_heads", reader.num_attention_heads)
    width = _head_dim(reader) * key_heads
    total_reader = sum(own.values())
    total_retriever = backbone["decoder"] + backbone["embedding"]
    return Plan(
        reader_weights=total_reader,
        retriever_weights=total_retriever,
        trained_weights=trained,
        documents=documents,
        read_tokens=read,
        suffix_tokens=suffix,
        encoded_tokens=encoded,
        operations=operations,
        weight_bytes=size * (total_reader + total_retriever) + _OPTIMIZER_BYTES * trained,
        prefix_bytes=2 * size * reader.num_hidden_layers * width * read,
        activation_bytes=size * layers * kept * _kept_values(retriever),
        steps=config.max_steps,
    )


def measured_rate(device: torch.device, dtype: torch.dtype, size: int = 1536) -> float:
    """Operations a second of one large matrix product on this machine, the best of a few."""
    left = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def shape_of(config: TrainConfig, name: str) -> Any:
    """The configuration of a model that a config names."""
    return model_config(
        resolve_model(name, config.dtype),
        trust_remote_code=config.trust_remote_code,
        what="reader" if name == config.reader else "retriever",
    )


def _head_dim(shape: Any) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def _adapter_weights(shape: Any, layers: int, rank: int) -> int:
    """Weights of LoRA on the seven projections of every layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries = _head_dim(shape) * shape.num_attention_heads
    keys = _head_dim(shape) * getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    sides = (hidden + queries) * 2 + (hidden + keys) * 2 + (hidden + inner) * 3
    return layers * rank * sides


def _kept_values(shape: Any) -> int:
    """Values that the backward of one decoder layer keeps for a token.

    Inputs of the norms and projections, queries, keys and values, the attention's output, and the
    parts of the gated product.
    """
    queries = _head_dim(shape) * shape.num_attention_heads
    return 6 * shape.hidden_size + 4 * shape.intermediate_size + 2 * queries
