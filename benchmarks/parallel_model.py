"""Bytes, memory and time of a training step with many GPUs: a model, not a measurement.

Sizes and operations are counted as in ``dream_training.preflight.plan``, with attention added.
What the collectives of context parallel reading carry is counted by the tests in a run of two
processes. Rates are assumptions, named below. ``docs/parallel-reading.md`` explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from dream_training.models.architectures import model_config, parameter_count
from dream_training.preflight.plan import STEP_SHARE

from .floors import H100

READERS = {
    "0.5B": "Qwen/Qwen2.5-0.5B",
    "1B": "meta-llama/Llama-3.2-1B",
    "3B": "meta-llama/Llama-3.2-3B",
    "8B": "meta-llama/Llama-3.1-8B",
    "70B": "meta-llama/Llama-3.1-70B",
}
RETRIEVER = "Qwen/Qwen2.5-0.5B"
LORA_RANK = 64
GPUS = tuple(2**i for i in range(10))

# A pass of the reader takes so many suffixes with gradient, or documents without; a mini-batch of
# the retriever so many tokens.
SUFFIXES_IN_PASS = 32
DOCUMENTS_IN_PASS = 32
MINI_BATCH_TOKENS = 16384
_BF16, _FP32 = 2, 4
_OPTIMIZER = 16  # weight, gradient and two moments of a trained weight, in float32


@dataclass(frozen=True)
class Cluster:
    """Rates of the machines, in bytes and operations a second for one GPU.

    Attributes:
        compute: what a whole step reaches.
        node: GPUs joined by NVLink.
        nvlink: one way.
        network: one way, a network card for each GPU.
        yields: share of a link's rate that large collectives reach.
        latency: seconds of a collective within a node.
        hop: seconds more for every doubling of the nodes.
        memory: of a GPU that may be used.
    """

    compute: float
    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    yields: float = 0.8
    latency: float = 10e-6
    hop: float = 5e-6
    memory: float = 72e9

    def link(self, ranks: int, stride: int) -> tuple[float, float]:
        """Bytes a second and latency of a collective over every ``stride``-th of the GPUs.

        A ring enters and leaves each node once, so all its members in a node share their cards.
        """
        if ranks * stride <= self.node:
            return self.nvlink * self.yields, self.latency
        members = max(1, self.node // stride)
        hops = math.log2(max(2, ranks * stride / self.node))
        return min(
            self.nvlink, members * self.network
        ) * self.yields, self.latency + self.hop * hops


# NVIDIA's data sheets: H100 SXM, 80 GB (a tenth left free), NVLink 900 GB/s both ways together;
# DGX H100, a 400 Gb/s card for each GPU. Compute: the yield of a large matrix product assumed in
# floors.py, times the share that whole steps reached, measured on a CPU: 338 TFLOP/s, 34 % of the
# data sheet's. Training of Llama 3 reached 38 to 43 % (arXiv 2407.21783, table 4).
H100S = Cluster(compute=H100.gemm * STEP_SHARE)


@dataclass(frozen=True)
class Shape:
    """A decoder, as far as costs depend on it; weights by what they are for."""

    layers: int
    hidden: int
    inner: int
    query_heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    decoder: int
    other: int

    @property
    def key_value_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * _BF16 * self.layers * self.key_heads * self.head_dim

    @property
    def weight_bytes(self) -> int:
        return _BF16 * (self.decoder + self.other)

    @property
    def kept(self) -> int:
        """Values of a token that a layer's backward needs, as the plan counts them."""
        return 6 * self.hidden + 4 * self.inner + 2 * self.query_heads * self.head_dim

    @property
    def adapter_weights(self) -> int:
        """LoRA on the seven projections of every layer."""
        queries, keys = self.query_heads * self.head_dim, self.key_heads * self.head_dim
        sides = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        return self.layers * LORA_RANK * (sides + 3 * (self.hidden + self.inner))


@cache
def shape_of(name: str) -> Shape:
    """The shape of a model that the package knows by name."""
    config = model_config(name)
    weights = parameter_count(config)
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        query_heads=heads,
        key_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        decoder=weights["decoder"],
        other=weights["embedding"] + weights["head"],
    )


@dataclass(frozen=True)
class Load:
    """A step of the whole world: one pool of documents that every query competes over.

    Attributes:
        queries: in all.
        documents: in all.
        document_tokens: of each.
        query_tokens: of each, read by the retriever.
        suffix_tokens: of each query with prompt and target, read by the reader.
        target_tokens: of each.
    """

    queries: int
    documents: int
    document_tokens: int
    query_tokens: int = 32
    suffix_tokens: int = 108
    target_tokens: int = 64


def gathered_candidates(gpus: int) -> Load:
    """32 queries for each GPU and one document of 156 tokens for each query: the recipes' batch."""
    return Load(32 * gpus, 32 * gpus, 156)


def long_documents(gpus: int) -> Load:
    """16 queries over 128 documents of 1,024 tokens, however many GPUs share the work."""
    return Load(16, 128, 1024)


@dataclass(frozen=True)
class Layout:
    """How ``gpus`` share a step; what is left after tensor and context is data parallel.

    Attributes:
        gpus: ``G``.
        tensor: ``t``, ranks that share each matrix product, next to each other.
        context: ``R``, groups of them that each hold a part of the documents and run the same
            suffixes.
        sharded: whether the reader's weights are spread over all ranks and gathered by layers.
        reads_all: whether each rank reads all documents it holds, or a share of them, and gets the
            others' keys and values from the ranks that read them.
    """

    gpus: int
    tensor: int = 1
    context: int = 1
    sharded: bool = False
    reads_all: bool = False

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.context)

    @property
    def strategy(self) -> str:
        if self.tensor > 1:
            return "tensor, context" if self.context > 1 else "tensor"
        if self.context > 1:
            return "context, sharded" if self.sharded else "context"
        if self.sharded:
            return "sharded"
        return "replicated" if self.reads_all or self.gpus == 1 else "gathered"

    def __str__(self) -> str:
        return f"{self.strategy} {self.sizes}" if self.sizes else self.strategy

    @property
    def sizes(self) -> str:
        """``t`` and ``R`` where they are not 1, as in ``8 x 4``."""
        return " x ".join(str(n) for n in (self.tensor, self.context) if n > 1)


# From the simplest to the most involved.
STRATEGIES = (
    "replicated", "gathered", "sharded", "tensor", "context", "context, sharded",
    "tensor, context",
)  # fmt: skip


def layouts(shape: Shape, load: Load, gpus: int, node: int = 8) -> Iterator[Layout]:
    """All layouts of a number of GPUs, from the simplest to the most involved."""
    yield Layout(gpus, reads_all=True)
    if gpus == 1:
        return
    yield Layout(gpus)
    yield Layout(gpus, sharded=True)
    sizes = [n for n in (2, 4, 8) if n <= min(gpus, node) and shape.query_heads % n == 0]
    tensor = [Layout(gpus, tensor=size) for size in sizes]
    yield from tensor
    for sharded in (False, True):
        for size in GPUS[1:]:
            if size <= min(gpus, load.documents):
                yield Layout(gpus, context=size, sharded=sharded)
    for layout in tensor:
        for size in GPUS[1:]:
            if size * layout.tensor <= gpus and size <= load.documents:
                yield replace(layout, context=size)


@dataclass(frozen=True)
class Cost:
    """What one rank does in a step.

    Attributes:
        operations: floating-point operations.
        weights_sent: bytes of gathered weights.
        keys_sent: bytes of gathered keys and values of documents.
        tensor_sent: bytes of the sums of tensor parallelism.
        partial_sent: bytes of the partial sums of context parallelism.
        retriever_sent: bytes of the retriever's gradient and of embeddings.
        weight_bytes: in memory: both models, and the optimiser.
        key_bytes: in memory: keys and values of documents.
        activation_bytes: in memory: of the larger of the reader's and the retriever's backward.
        seconds: of the step.
    """

    operations: float
    weights_sent: float
    keys_sent: float
    tensor_sent: float
    partial_sent: float
    retriever_sent: float
    weight_bytes: float
    key_bytes: float
    activation_bytes: float
    seconds: float

    @property
    def sent(self) -> float:
        return (
            self.weights_sent + self.keys_sent + self.tensor_sent + self.partial_sent
            + self.retriever_sent
        )  # fmt: skip

    @property
    def memory(self) -> float:
        return self.weight_bytes + self.key_bytes + self.activation_bytes


def partial_numbers(query_heads: int, head_dim: int, rows: int) -> int:
    """Numbers that one call of ``context_parallel_attention`` sums over the ranks.

    Forward and backward, with the gradient of the queries, and without the one number for each
    batch element: two maxima, two sums and the output; the mean of ``dO . o_d`` and the gradient.
    """
    return query_heads * rows * ((4 + head_dim) + (1 + head_dim))


def ring_bytes(ranks: int, payload: float, *, reduce: bool) -> float:
    """Bytes that a rank of a ring sends: a sum travels twice, a gathering of ``payload`` once."""
    return (2 if reduce else 1) * (ranks - 1) / ranks * payload


def cost(
    reader: Shape, load: Load, layout: Layout, cluster: Cluster = H100S, retriever: str = RETRIEVER
) -> Cost:
    """Count a step. Every formula stands in ``docs/parallel-reading.md``."""
    student = shape_of(retriever)
    gpus, t, r = layout.gpus, layout.tensor, layout.context
    held = math.ceil(load.documents / r)
    read = held if layout.reads_all else min(held, math.ceil(load.documents * t / gpus))
    held_tokens, read_tokens = held * load.document_tokens, read * load.document_tokens
    queries = math.ceil(load.queries / layout.data)
    rows, targets = queries * load.suffix_tokens, queries * load.target_tokens
    passes = math.ceil(queries / SUFFIXES_IN_PASS)
    read_passes = math.ceil(read / DOCUMENTS_IN_PASS)
    encoded = math.ceil(load.documents / gpus) * load.document_tokens
    encoded += math.ceil(load.queries / gpus) * load.query_tokens

    width = reader.layers * reader.query_heads * reader.head_dim
    head = reader.vocabulary * reader.hidden
    operations = 2.0 * reader.decoder * (read_tokens + 2 * rows) + 4.0 * head * targets
    operations += 2.0 * width * read_tokens * load.document_tokens
    operations += 10.0 * width * rows * held_tokens
    operations = operations / t + 6.0 * student.decoder * encoded

    key_bytes = reader.key_value_bytes * held_tokens / min(t, reader.key_heads)
    keys_sent = 0.0 if layout.reads_all else ring_bytes(layout.data, key_bytes, reduce=False)
    weights_sent = 0.0
    if layout.sharded:
        # FSDP keeps what is outside the layers between forward and backward.
        weights = (read_passes + 2 * passes) * reader.decoder + (
            read_passes + passes
        ) * reader.other
        weights_sent = ring_bytes(gpus // t, _BF16 * weights / t, reduce=False)
    in_products = _BF16 * reader.hidden * reader.layers
    tensor_sent = ring_bytes(t, in_products * (2 * read_tokens + 4 * rows), reduce=True)
    numbers = partial_numbers(reader.query_heads // t, reader.head_dim, rows) * reader.layers
    partial_sent = ring_bytes(r, _FP32 * numbers, reduce=True)
    trained = student.adapter_weights
    embeddings = (load.documents + load.queries) * student.hidden * _FP32
    retriever_sent = ring_bytes(gpus, _FP32 * trained, reduce=True)
    retriever_sent += 2 * ring_bytes(gpus, embeddings, reduce=False)

    weight_bytes = reader.weight_bytes / (gpus if layout.sharded else t)
    if layout.sharded:
        weight_bytes += 2 * _BF16 * reader.decoder / reader.layers + _BF16 * head
    weight_bytes += student.weight_bytes + _OPTIMIZER * trained
    in_pass = min(queries, SUFFIXES_IN_PASS)
    of_reader = _BF16 * reader.layers * in_pass * load.suffix_tokens * reader.kept / t
    of_reader += 2 * _FP32 * in_pass * load.target_tokens * reader.vocabulary / t
    reading = min(read, DOCUMENTS_IN_PASS) * load.document_tokens
    of_reading = _BF16 * reading * (4 * reader.hidden + 2 * reader.inner) / t
    of_student = _BF16 * student.layers * min(encoded, MINI_BATCH_TOKENS) * student.kept

    def travel(sent: float, ranks: int, stride: int, calls: float) -> float:
        if ranks == 1:
            return 0.0
        rate, latency = cluster.link(ranks, stride)
        return sent / rate + calls * latency

    layers = reader.layers
    in_step = travel(tensor_sent, t, 1, layers * (2 * read_passes + 4 * passes))
    in_step += travel(partial_sent, r, t, layers * 5 * passes)
    in_step += travel(retriever_sent, gpus, 1, 3)
    # Weights and keys are asked for a layer ahead, so they travel while the GPU computes.
    behind = 0.0
    if weights_sent:
        behind += travel(weights_sent, gpus // t, t, layers * (read_passes + 2 * passes))
    if keys_sent:
        behind += travel(keys_sent, layout.data, t * r, layers)
    return Cost(
        operations=operations,
        weights_sent=weights_sent,
        keys_sent=keys_sent,
        tensor_sent=tensor_sent,
        partial_sent=partial_sent,
        retriever_sent=retriever_sent,
        weight_bytes=weight_bytes,
        key_bytes=key_bytes,
        activation_bytes=max(of_reader, of_reading, of_student),
        seconds=max(operations / cluster.compute, behind) + in_step,
    )


def best(
    reader: Shape, load: Load, gpus: int, strategy: str | None = None, cluster: Cluster = H100S
) -> tuple[Layout, Cost] | None:
    """The simplest layout within 3 % of the fastest that fits, or None where none fits.

    Args:
        reader: the frozen model.
        load: the step.
        gpus: how many.
        strategy: only layouts of this one; None for all.
        cluster: the machines.
    """
    fitting = []
    for layout in layouts(reader, load, gpus, cluster.node):
        if strategy in (None, layout.strategy):
            counted = cost(reader, load, layout, cluster)
            if counted.memory <= cluster.memory:
                fitting.append((layout, counted))
    if not fitting:
        return None
    least = min(counted.seconds for _, counted in fitting)
    return next(pair for pair in fitting if pair[1].seconds <= 1.03 * least)


def crossing_tokens(reader: Shape, rows: int) -> float:
    """Document tokens from which partial sums are fewer bytes than the documents' keys and values.

    For many ranks: ``8 Hq (2 D + 5) rows`` against ``4 Hkv D tokens`` in each layer, which is
    about ``4 Hq / Hkv`` tokens for each row of the suffixes.
    """
    partial = 2 * _FP32 * reader.layers * partial_numbers(reader.query_heads, reader.head_dim, rows)
    return partial / reader.key_value_bytes
