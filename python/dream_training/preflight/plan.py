"""What a training run will cost: counted weights, tokens, operations and bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dream_training.models.architectures import model_config, parameter_count
from dream_training.models.loading import resolve_model
from dream_training.reading.quantization import bytes_of_weight

if TYPE_CHECKING:
    from dream_training.config import TrainConfig
    from dream_training.config_groups import RunConfig

# Of the rate of a large matrix product, what a whole step reached on a CPU: a tera-operation in
# 5.9 s at 387 giga-operations a second (``python -m benchmarks step``, one pool for the batch).
STEP_SHARE = 0.45
# Dense bfloat16 rate in the data sheet, for the column of a device that is not here.
H100_PEAK = 989e12
_PROMPT_TOKENS = 12
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_OPTIMIZER_BYTES = 4 + 4 + 4 + 4  # weight, gradient, two moments, all in float32


@dataclass(frozen=True)
class RunPlan:
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


def make_plan(config: TrainConfig, documents_per_row: int = 1) -> RunPlan:
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
    lengths, pools, steps = config.lengths, config.pools, config.optimisation
    depth, rank = config.retriever.retriever_layers, config.retriever.lora_r
    retriever = architecture_of(config.retriever.model, "retriever", config.run)
    reader = None
    if config.needs_reader:
        reader = architecture_of(config.reader.model, "reader", config.run)
    own = {"decoder": 0} if reader is None else parameter_count(reader)
    head = 0 if reader is None else reader.vocab_size * reader.hidden_size
    backbone = parameter_count(retriever, depth)
    layers = min(depth or 10**6, retriever.num_hidden_layers)
    if pools.pool == "in_batch":
        documents_per_row = 1
    elif pools.documents_per_query is not None:
        documents_per_row = min(documents_per_row, pools.documents_per_query)
    documents = steps.batch_size * documents_per_row
    if config.data.taught is not None and pools.pool != "mined":
        documents = documents_per_row  # each line has the pool of its batch
    read = suffix = targets = 0
    if reader is not None:
        read = documents * (lengths.reader_passage_max_len or lengths.passage_max_len)
        targets = steps.batch_size * lengths.target_max_len
        suffix = steps.batch_size * (lengths.query_max_len + _PROMPT_TOKENS) + targets
    encoded = documents * lengths.passage_max_len + steps.batch_size * lengths.query_max_len
    operations = 2.0 * own["decoder"] * (read + 2 * suffix) + 4.0 * head * targets
    operations += 4.0 * backbone["decoder"] * encoded
    kept = encoded
    if steps.mini_batch_size is not None:
        operations += 2.0 * backbone["decoder"] * encoded
        kept = min(encoded, steps.mini_batch_size * lengths.passage_max_len)
    if rank:
        trained = _adapter_weights(retriever, layers, rank)
    else:
        trained = backbone["decoder"] + backbone["embedding"]
        operations += 2.0 * backbone["decoder"] * encoded
    operations *= steps.gradient_accumulation_steps
    size = _BYTES.get(config.run.dtype, 2)
    # Embeddings and head are not quantised.
    quantised = bytes_of_weight(config.reader.reader_quantization) or size
    total_reader = sum(own.values())
    total_retriever = backbone["decoder"] + backbone["embedding"]
    return RunPlan(
        reader_weights=total_reader,
        retriever_weights=total_retriever,
        trained_weights=trained,
        documents=documents,
        read_tokens=read,
        suffix_tokens=suffix,
        encoded_tokens=encoded,
        operations=operations,
        weight_bytes=int(quantised * own["decoder"])
        + size * (total_reader - own["decoder"] + total_retriever)
        + _OPTIMIZER_BYTES * trained,
        prefix_bytes=0 if reader is None else 2 * size * _key_values(reader) * read,
        activation_bytes=size * layers * kept * _kept_values(retriever),
        steps=steps.max_steps,
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


def architecture_of(name: str, what: str, run: RunConfig) -> Any:
    """The transformers configuration of the model that the config key ``what`` names."""
    return model_config(
        resolve_model(name, run.dtype, what), trust_remote_code=run.trust_remote_code, what=what
    )


def _head_dim(shape: Any) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def _key_values(shape: Any) -> int:
    """Values of the keys of one token in all layers."""
    heads = getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    return shape.num_hidden_layers * _head_dim(shape) * heads


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
