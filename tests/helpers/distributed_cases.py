"""What the processes of a test run, and the same in one process to compare with."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from dream_kernels import inject_attention
from dream_training.distributed import world
from dream_training.distributed.gather import gather_rows
from dream_training.distributed.pool import Share
from dream_training.evaluation.retrieval import RetrievalTask, search
from dream_training.models.retriever import build_retriever, save_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distillation import EmdrLoss, ReplugLoss
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.infonce import PoolInfoNCELoss
from dream_training.objectives.revela import TEXT_PROMPT, RevelaLoss
from dream_training.objectives.temperature import Temperature
from dream_training.reading.pool import read_each, read_pool
from dream_training.reading.reader import Reader
from helpers.tiny import HEADS, WORDS, in_double, make_decoder, make_tokenizer

ALL_HEADS = {layer: [0, 1, 2, 3] for layer in range(3)}


def make_rows(count: int, *, shared: int = 0) -> list[dict[str, Any]]:
    """Rows of unequal lengths; every ``shared``-th document is that of the first row."""
    rows = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        copied = shared and i % shared == 0
        rows.append(
            {
                "query": f"where is {word} {i}?",
                "target": word * (1 + i % 3),
                "documents": [
                    "the first of all" if copied else f"{word} number {i} " + "is here " * (i % 4),
                    f"also {word} {i % 3}",
                ],
                "positive": 0,
            }
        )
    return rows


def make_retriever(folder: str, lora_r: int = 4) -> Any:
    """The same tiny retriever in every process."""
    torch.manual_seed(0)
    model = build_retriever(folder, layers=2, lora_r=lora_r, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B starts at zero
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return in_double(model)


def make_loss(model: Any, objective: str, *, sharded: bool = False, **options: Any) -> Any:
    """An objective in double precision."""
    context, rows = options.pop("context", "independent"), options.pop("rows_per_pass", None)
    reading = {"context": context, "impl": "reference", "rows_per_pass": rows}
    temperature = options.pop("temperature", 0.1)

    def reader(heads: dict, **more: Any) -> Reader:
        made = Reader(in_double(make_decoder()), make_tokenizer(), heads, **reading, **more)
        return made.shard("cpu") if sharded else made

    if objective == "infonce":
        return PoolInfoNCELoss(model, temperature, **options)
    if objective == "dream":
        return DreamLoss(model, reader(HEADS), temperature, **options)
    if objective == "distilled":
        return DistilledDreamLoss(model, reader(HEADS), temperature, **options)
    if objective == "replug":
        return ReplugLoss(model, reader(HEADS), temperature, **options)
    if objective == "emdr":
        return EmdrLoss(model, reader(HEADS), temperature, **options)
    return RevelaLoss(
        model, reader(ALL_HEADS, prompt=TEXT_PROMPT, target_max_len=128), temperature, **options
    )


def features(model: Any, rows: list[dict], pool: str) -> list[dict[str, Any]]:
    """What the trainer makes of the collator's batch."""
    batch = DreamCollator(model, pool=pool)(rows)
    return [
        {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
        for prefix in ("query_", "document_")
    ]


def wrap(model: Any, engine: str | None) -> Any:
    """The retriever as an engine trains it."""
    if engine == "ddp":
        # As the trainer does for sentence-transformers.
        return nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=True, broadcast_buffers=False
        )
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world.size(),))
        for layer in model[0].auto_model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def gradients(model: Any) -> Tensor:
    """Of all trained parameters, in one vector."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            found.append(getattr(gradient, "full_tensor", lambda g=gradient: g)().flatten())
    return torch.cat(found)


def step(
    folder: str,
    batches: list[list[dict]],
    objective: str = "dream",
    *,
    engine: str | None = None,
    pool: str = "both",
    lora_r: int = 4,
    learnable: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Forward and backward of this process's batch: the loss of all, its gradient, metrics."""
    model = make_retriever(folder, lora_r)
    batch = features(model, batches[world.rank()], pool)
    if learnable:
        options["temperature"] = Temperature(0.1, learnable=True).double()
    loss_of = make_loss(model, objective, **options)
    loss_of.model = wrap(model, engine)
    loss = loss_of(batch)
    loss.backward()
    result = {
        "loss": world.sum_over_ranks({"loss": loss.item()})["loss"] / world.size(),
        "gradient": gradients(model),
        "metrics": loss_of.metrics,
    }
    if learnable:
        result["temperature"] = loss_of.temperature.log.grad
    return result


def accumulated(
    folder: str, batches: list[list[list[dict]]], objective: str = "dream", engine: str = "ddp"
) -> dict[str, Any]:
    """A step of several batches of this process, as the trainer takes it."""
    model = make_retriever(folder)
    loss_of = make_loss(model, objective)
    loss_of.model = wrapped = wrap(model, engine)
    own, state = batches[world.rank()], GradientState()
    try:
        for rows in own:
            last = rows is own[-1]
            state._set_sync_gradients(last)
            if engine == "fsdp2":
                model.set_requires_gradient_sync(last)
            alone = engine == "ddp" and not last
            with wrapped.no_sync() if alone else nullcontext():
                loss = loss_of(features(model, rows, "both"))
                (loss / len(own)).backward()
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        state._set_sync_gradients(True)
    return {"gradient": gradients(model), "metrics": loss_of.metrics}


def alone(
    folder: str, batches: list[list[dict]], objective: str = "dream", **options: Any
) -> dict[str, Any]:
    """The same in one process: its batches one after another, weighted by what they are means of.

    One batch stands for a pool of all processes, several for a pool each.
    """
    pool, lora_r = options.pop("pool", "both"), options.pop("lora_r", 4)
    model = make_retriever(folder, lora_r)
    loss_of = make_loss(model, objective, **options)
    total, all_terms = torch.zeros((), dtype=torch.float64), 0
    for rows in batches:
        seen: dict[str, int] = {}
        original = loss_of.terms

        def terms(*args: Any, seen: dict = seen, original: Any = original) -> int:
            seen["terms"] = original(*args)
            return seen["terms"]

        loss_of.terms = terms
        loss = loss_of(features(model, rows, pool))
        loss_of.terms = original
        total = total + loss * seen["terms"]
        all_terms += seen["terms"]
    loss = total / all_terms
    loss.backward()
    return {
        "loss": loss.item(),
        "gradient": gradients(model),
        "metrics": loss_of.metrics,
        "temperature": getattr(loss_of.temperature.log, "grad", None),
    }


def prefixes(kind: str, lengths: list[int]) -> list[Any]:
    """Places, masks and keys of a pool that is read in shares, and of the pool read at once."""
    texts = [f"{i} " + "word " * length for i, length in enumerate(lengths)]
    reader = Reader(in_double(make_decoder()), make_tokenizer(), HEADS, impl="reference")
    cut = len(lengths) // 3
    share = Share((cut, len(lengths) - cut))
    read = {"pool": read_pool, "each": read_each}[kind]
    joined = read(reader, {"texts": texts, "share": share})
    whole = read(reader, {"texts": texts})
    return [
        (p.spans, p.next_position, p.mask, [key for key, _ in p.layers], p.positions)
        for p in (joined, whole)
    ]


def gather_with_weights(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The rows of both processes, and the gradient of a loss in which each weighs them its way."""
    own = torch.tensor(rows[world.rank()], dtype=torch.float64, requires_grad=True)
    joined = gather_rows(own, [len(part) for part in rows])
    weights = torch.arange(1.0, len(joined) + 1, dtype=torch.float64) * 10 ** world.rank()
    (joined * weights).sum().backward()
    return joined.detach(), own.grad


def search_in_shares(folder: str, corpus: dict[str, str], queries: dict[str, str]) -> list[Any]:
    """Rankings by all processes together and by each alone."""
    task = RetrievalTask(queries, corpus, {})
    model = make_retriever(folder)
    limits = {"query_max_len": 8, "passage_max_len": 12}
    shared = search(model, task, over_ranks=True, **limits)
    return [shared, search(model, task, **limits)]


def saved_from_shards(folder: str, path: str) -> Tensor:
    """Embeddings of a retriever, which is then sharded, run once, and saved."""
    model = make_retriever(folder).float()
    texts = ["some text", "other"]
    before = model.encode(texts, convert_to_tensor=True)
    sharded = wrap(model, "fsdp2")
    sharded(dict(sharded.preprocess(texts)))["sentence_embedding"].sum().backward()
    save_retriever(sharded, path)
    # The sharded model still computes the same.
    after = sharded(dict(sharded.preprocess(texts)))["sentence_embedding"].detach()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    return before


def reader_shards(folder: str) -> tuple[int, int]:
    """How many numbers of a reader's layers this process holds, of how many."""
    reader = Reader(make_decoder(), make_tokenizer(), HEADS)
    layers = reader.model.base_model.layers
    whole = sum(p.numel() for p in layers.parameters())
    reader.shard("cpu")
    reader.read(["a text"])
    return sum(p.to_local().numel() for p in layers.parameters()), whole


def refusal(*args: Any, **options: Any) -> str:
    """Why a step is refused."""
    try:
        step(*args, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def told_by_main(fails: bool) -> Any:
    """What process 0 alone finds out."""

    def run() -> list[int]:
        if fails:
            raise ValueError("no heads here")
        return [world.rank(), 7]

    try:
        return world.on_main(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def tensor_parallel(folder: str, by: str) -> tuple[bool, str]:
    """Inject a model whose heads are split over the processes, and return what is said of it.

    Args:
        folder: the model.
        by: "transformers", or "torch", whose plan the model knows nothing of.

    Returns:
        Whether the plain model gives the logits that it gives in one process, and the error.
    """
    ids, spans = torch.arange(3, 15)[None], torch.tensor([[[1, 4], [4, 7]]])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if by == "transformers":
        options = {"dtype": torch.float32, "tp_plan": "auto", "tp_size": 2}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        model = copy.deepcopy(whole)
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.layers:
            parallelize_module(layer, mesh, {**plan, "self_attn.o_proj": RowwiseParallel()})
    with torch.no_grad():
        equal = torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-4)
        try:
            with inject_attention(model, {1: [0, 1]}):
                model(ids, document_scores=torch.tensor([[0.0, 2.0]]), document_spans=spans)
        except ValueError as error:
            return equal, str(error)
    return equal, "nothing"
