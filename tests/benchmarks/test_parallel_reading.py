"""The model of reading on many GPUs: its arithmetic, and its counts against real collectives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import parallel_model, parallel_reading
from benchmarks.parallel_model import (
    GPUS,
    H100S,
    READERS,
    RETRIEVER,
    Layout,
    Load,
    Shape,
    best,
    cost,
    crossing_tokens,
    gathered_candidates,
    long_documents,
    ring_bytes,
    shape_of,
)
from dream_kernels import read_independently
from dream_training.config import TrainConfig
from dream_training.preflight.plan import make_plan
from helpers.own_process import run_ranks

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval().requires_grad_(False)


def tiny_shape() -> Shape:
    model = tiny_model()
    embeddings = 2 * model.get_input_embeddings().weight.numel()
    decoder = sum(p.numel() for p in model.parameters()) - embeddings
    return Shape(3, 32, 48, 4, 2, 8, 64, decoder, embeddings)


def test_one_gpu_costs_what_the_plan_of_a_run_counts() -> None:
    model = "Qwen/Qwen2.5-0.5B"
    plan = make_plan(
        TrainConfig(
            reader=model, retriever=model, train_data="none", batch_size=32,
            query_max_len=32, passage_max_len=156,
            target_max_len=64, lora_r=parallel_model.LORA_RANK, mini_batch_size=16,
            dtype="bfloat16",
        )
    )  # fmt: skip
    load, shape = gathered_candidates(1), shape_of(model)
    counted = cost(shape, load, Layout(1, reads_all=True))
    width = 24 * 14 * 64
    rows, tokens = 32 * 108, 32 * 156
    attention = 2 * width * tokens * 156 + 10 * width * rows * tokens
    assert plan.operations + attention == pytest.approx(counted.operations, rel=1e-12)
    assert plan.prefix_bytes == counted.key_bytes
    assert plan.weight_bytes == counted.weight_bytes
    assert plan.suffix_tokens == rows
    assert counted.sent == 0


def test_a_token_of_a_real_prefix_has_the_bytes_that_the_model_counts() -> None:
    prefix = read_independently(tiny_model(), [[3, 4, 5], [6, 7, 8]])
    size = sum(t.numel() * 2 for layer in prefix.layers for t in layer)  # as in bfloat16
    assert size == 6 * tiny_shape().key_value_bytes


@pytest.mark.parametrize(
    ("name", "kib"), [("0.5B", 12), ("1B", 32), ("3B", 112), ("8B", 128), ("70B", 320)]
)
def test_keys_and_values_of_a_token(name: str, kib: int) -> None:
    assert shape_of(READERS[name]).key_value_bytes == kib * 1024


def test_rings_and_links() -> None:
    assert ring_bytes(1, 8.0, reduce=True) == 0
    assert ring_bytes(4, 8.0, reduce=True) == 12
    assert ring_bytes(4, 8.0, reduce=False) == 6
    assert H100S.link(8, 1) == (360e9, 10e-6)
    assert H100S.link(2, 8) == (40e9, pytest.approx(15e-6))  # one member in each of two nodes
    assert H100S.link(8, 4) == (80e9, pytest.approx(20e-6))  # two members in each of four nodes
    assert H100S.link(64, 1)[0] == 320e9  # eight cards serve the ring of a node


@pytest.mark.parametrize("name", READERS)
def test_partial_sums_are_fewer_bytes_from_the_crossing_on(name: str) -> None:
    """64 ranks that all run the same suffixes against 64 that gather the documents' keys."""
    shape, rows = shape_of(READERS[name]), 108
    crossing = crossing_tokens(shape, rows)
    for factor in (0.9, 1.1):
        documents = 64 * round(factor * crossing / 64)
        load = Load(queries=1, documents=documents, document_tokens=1)
        split = cost(shape, load, Layout(64, context=64))
        gathered = cost(shape, load, Layout(64))
        assert split.keys_sent == gathered.partial_sent == 0
        assert (split.partial_sent < gathered.keys_sent) == (factor > 1)


def test_partial_sums_do_not_depend_on_the_documents() -> None:
    shape, layout = shape_of(READERS["1B"]), Layout(8, context=8)
    few, many = (cost(shape, Load(4, n, 256), layout) for n in (8, 800))
    assert few.partial_sent == many.partial_sent > 0
    assert many.key_bytes == 100 * few.key_bytes


def test_splitting_divides_memory() -> None:
    shape, load = shape_of(READERS["8B"]), long_documents(8)
    whole = cost(shape, load, Layout(8))
    split = cost(shape, load, Layout(8, context=8))
    tensor = cost(shape, load, Layout(8, tensor=8))
    sharded = cost(shape, load, Layout(8, sharded=True))
    assert whole.key_bytes == 8 * split.key_bytes == 8 * tensor.key_bytes == sharded.key_bytes
    assert sharded.weight_bytes < split.weight_bytes == whole.weight_bytes
    # A reader with two key heads keeps each of them four times on eight ranks.
    few = replace(shape, key_heads=2)
    assert (
        cost(few, load, Layout(8, tensor=8)).key_bytes * 2 == cost(few, load, Layout(8)).key_bytes
    )


def test_what_does_not_fit_is_not_chosen() -> None:
    shape = shape_of(READERS["70B"])
    assert best(shape, long_documents(1), 1) is None
    for gpus in GPUS:
        for load in (gathered_candidates, long_documents):
            found = best(shape, load(gpus), gpus)
            assert found is None or found[1].memory <= H100S.memory


def test_the_page_holds_these_tables() -> None:
    page = Path(parallel_reading._PAGE).read_text()
    assert parallel_reading.fill(page) == page, "python -m benchmarks.parallel_reading --write"
    with pytest.raises(ValueError, match="one place for 'crossings'"):
        parallel_reading.fill("")


class CollectiveElements(TorchDispatchMode):
    """Notes which collectives run, and the elements that each of them gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        for kind in ("all_reduce", "allgather"):
            if "c10d" in name and kind in name and isinstance(args[0], Tensor):
                self.calls.append((kind, args[0].numel()))
        return function(*args, **(kwargs or {}))


def _tensor_parallel(model: LlamaForCausalLM, mesh) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    # Prepared inputs sum the gradients of q, k and v before they travel, which the bare plan of
    # column-wise projections does not: it sends five sums a layer backward instead of two.
    states = {"hidden_states": Replicate()}
    attention = PrepareModuleInput(input_kwarg_layouts=states, desired_input_kwarg_layouts=states)
    product = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    columns = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {"self_attn": attention, "mlp": product, **plan})


def _sharded(model: LlamaForCausalLM, mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    seen = {}
    for name, share in (("tensor", _tensor_parallel), ("sharded", _sharded)):
        model = tiny_model()
        share(model, mesh)
        states = torch.randn(2, 5, 32, requires_grad=True)
        with CollectiveElements() as forward:
            out = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
        with CollectiveElements() as backward:
            out.sum().backward()
        seen[name] = {"forward": forward.calls, "backward": backward.calls}
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    pytest.importorskip("torch.distributed.fsdp", reason="no FSDP in this torch")
    folder = str(tmp_path_factory.mktemp("ranks"))
    run_ranks(work, 2, folder)
    return torch.load(Path(folder) / "rank0.pt")


def test_tensor_parallelism_sends_two_sums_a_layer_each_way(seen: dict) -> None:
    tokens = 10
    for way in ("forward", "backward"):
        assert seen["tensor"][way] == [("all_reduce", tokens * 32)] * 6
    # One query of 10 rows and one document of 10 tokens: forward twice, backward once.
    load = Load(1, 1, tokens, suffix_tokens=tokens)
    counted = cost(tiny_shape(), load, Layout(2, tensor=2), retriever=RETRIEVER)
    elements = 3 * sum(n for _, n in seen["tensor"]["forward"])
    assert counted.tensor_sent == ring_bytes(2, 2 * elements, reduce=True)


def test_sharded_weights_are_gathered_once_each_way(seen: dict) -> None:
    shape = tiny_shape()
    forward, backward = (seen["sharded"][way] for way in ("forward", "backward"))
    layers = shape.decoder - 32  # without the last norm, which is the root's
    assert sum(n for _, n in forward) == shape.decoder + 64 * 32  # the test runs no head
    assert sum(n for _, n in backward) == layers
    counted = cost(shape, Load(1, 1, 10), Layout(2, sharded=True))
    gathered = 3 * shape.decoder + 2 * shape.other
    assert counted.weights_sent == ring_bytes(2, 2 * gathered, reduce=False)


# The partial sums are counted where they travel, in tests/kernels/test_context_parallel.py.
