"""Documents split over ranks against one process that holds them all."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dream_kernels.context_parallel as context_parallel
from dream_kernels import context_parallel_attention
from helpers.agreement import Oracle
from helpers.cases import GRADIENTS, Case, Inputs, make_inputs
from helpers.own_process import run_ranks
from helpers.soak_record import SOAK, record

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)

WORLDS = (2, 4) if SOAK else (2,)
SPANS = ((2, 7), (7, 12), (14, 17), (19, 28), (30, 38))
# Where the prefix is cut, by the number of ranks. Every cut falls between documents.
CUTS = {2: (0, 17, 40), 4: (0, 12, 17, 29, 40)}


@dataclass(frozen=True)
class Split:
    """A case, and what is particular about its split.

    Attributes:
        case: with the whole prefix.
        cuts: by the number of ranks; rank ``r`` holds the keys from its cut to the next.
        needs: the inputs that require a gradient.
        keys_at_a_time: size of a block.
        score: a value that every second score is set to, if not None.
    """

    case: Case
    cuts: dict[int, tuple[int, ...]] = field(default_factory=lambda: CUTS)
    needs: tuple[str, ...] = GRADIENTS
    keys_at_a_time: int = 7
    score: float | None = None

    def __str__(self) -> str:
        return self.case.name

    def inputs(self, dtype: torch.dtype = torch.float64) -> Inputs:
        inputs = make_inputs(self.case, dtype)
        if self.score is not None:
            inputs.tensors["scores"][..., ::2] = self.score
        return inputs


def _splits() -> list[Split]:
    base = Case("base", spans=SPANS, prefix=40, local=9)
    absent = (
        ((2, 7), (9, 9), (14, 17), (19, 28), (30, 38)),
        ((2, 7), (7, 12), (0, 0), (0, 0), (0, 0)),
    )
    nowhere = (((0, 0), (5, 5), (0, 0), (0, 0), (0, 0)), SPANS)
    adjacent = ((0, 8), (8, 17), (17, 29), (29, 34), (34, 40))
    splits = [
        Split(base),
        Split(replace(base, name="few_heads_scored", heads=(1, 4))),
        Split(replace(base, name="no_head_scored", heads=())),
        Split(replace(base, name="scores_per_head", per_head_scores=True)),
        Split(replace(base, name="prefix_per_row", prefix_batch=2)),
        Split(replace(base, name="absent_documents", spans=absent)),
        Split(replace(base, name="no_document_in_one_row", spans=nowhere)),
        Split(replace(base, name="padding", padding=("left", "right", "middle"))),
        Split(replace(base, name="document_of_padding_only", padding=("document",))),
        Split(replace(base, name="row_of_padding_only", padding=("everything",))),
        Split(
            replace(base, name="documents_fill_the_prefix", spans=adjacent, rows=9),
            cuts={2: (0, 17, 40), 4: (0, 8, 17, 29, 40)},
        ),
        Split(
            replace(base, name="rank_without_documents"),
            cuts={2: (0, 0, 40), 4: (0, 0, 17, 17, 40)},
        ),
        Split(replace(base, name="not_causal", causal=False)),
        Split(replace(base, name="blocks_larger_than_the_prefix"), keys_at_a_time=256),
        Split(replace(base, name="large_scores", spread=1e4)),
        Split(replace(base, name="weight_0"), score=-torch.inf),
        Split(replace(base, name="ratio_1_own_scale", query_heads=3, key_heads=3, scale=0.7)),
        Split(replace(base, name="only_scores"), needs=("scores",)),
        Split(replace(base, name="scores_and_query"), needs=("scores", "query")),
        Split(replace(base, name="local_keys_alone"), needs=("key", "value")),
        Split(replace(base, name="prefix_alone"), needs=("prefix_key", "prefix_value")),
    ]
    variants = []
    for split in splits:
        name = split.case.name
        variants += [
            split,
            replace(split, case=replace(split.case, name=f"{name}-bias", mode="bias")),
            replace(split, case=replace(split.case, name=f"{name}-mass_0.6", document_mass=0.6)),
        ]
    last = Split(replace(base, name="base-mass_1.0", document_mass=1.0))
    return [*variants, last]


SPLITS = _splits()


def of_rank(inputs: Inputs, cuts: tuple[int, ...], rank: int) -> tuple[Inputs, list[int]]:
    """What one rank holds, and which documents those are.

    A document that is another rank's in one batch element only is absent there.
    """
    begin, end = cuts[rank], cuts[rank + 1]
    start, stop = inputs.spans.unbind(-1)
    own = (start >= begin) & (stop <= end) & (stop > start)  # [B, C]
    # A case whose cuts go through a document would lose it.
    held = torch.bucketize(start, torch.tensor(cuts), right=True)
    assert (stop <= torch.tensor(cuts)[held.clamp(max=len(cuts) - 1)])[stop > start].all()
    columns = own.any(0).nonzero().flatten().tolist() or [0]
    spans = (inputs.spans - begin) * own[..., None]
    tensors = {k: v.detach().clone() for k, v in inputs.tensors.items()}
    tensors["scores"] = tensors["scores"][..., columns]
    options, length = dict(inputs.options), tensors["prefix_key"].shape[2]
    if options["attention_mask"] is not None:
        mask = options["attention_mask"]
        options["attention_mask"] = torch.cat([mask[:, begin:end], mask[:, length:]], 1)
    for name in ("prefix_key", "prefix_value"):
        tensors[name] = tensors[name][:, :, begin:end].contiguous()
    return Inputs(tensors, spans[:, columns], options, inputs.grad_output), columns


class CountedSums:
    """Counts the elements that floating-point collectives of this process carry, by their size."""

    def __init__(self) -> None:
        self.elements: list[int] = []
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> CountedSums:
        def counted(tensor: Tensor, *args, **kwargs):
            if tensor.is_floating_point():
                self.elements.append(tensor.numel())
            return self._all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce = self._all_reduce


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, stored)
        return out


def _refusals(inputs: Inputs, cuts: tuple[int, ...], rank: int) -> dict[str, str]:
    """What each rank says when one of them, or what they share, is wrong."""
    own, _ = of_rank(inputs, cuts, rank)
    wrong = {
        "spans of rank 1": {"attention_mask": torch.ones(1, 1)} if rank == 1 else {},
        "different masses": {"document_mass": 0.5 + 0.1 * rank},
        "different needs": {},
    }
    said = {}
    for name, overrides in wrong.items():
        own.tensors["query"].requires_grad_(name == "different needs" and rank == 0)
        try:
            own.call(context_parallel_attention, **overrides)
            said[name] = "nothing"
        except (TypeError, ValueError) as error:
            said[name] = str(error)
    return said


def long_split(documents: int) -> Split:
    """Many keys, of few or many documents."""
    width = 2048 // documents
    spans = tuple((i * width, (i + 1) * width) for i in range(documents))
    case = Case(f"long_{documents}", spans=spans, prefix=2048, local=9, rows=9)
    cuts = {2: (0, 1024, 2048), 4: (0, 512, 1024, 1536, 2048)}
    return Split(case, cuts=cuts, keys_at_a_time=32)


def work(rank: int, world: int, folder: str) -> None:
    """One process: run everything and leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    results: dict[str, dict] = {}
    for split in [*SPLITS, long_split(4), long_split(64)]:
        context_parallel.KEYS_AT_A_TIME = split.keys_at_a_time
        own, columns = of_rank(split.inputs(), split.cuts[world], rank)
        own.require_grad(split.needs)
        with CountedSums() as counted, LargestTensor() as largest:
            result = own.run(context_parallel_attention)
        results[split.case.name] = {
            **result, "columns": columns, "sums": counted.elements, "largest": largest.elements
        }  # fmt: skip
    half, _ = of_rank(SPLITS[0].inputs(torch.float32), CUTS[world], rank)
    results["float32"] = half.require_grad().run(context_parallel_attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results["autocast"] = {"output": half.call(context_parallel_attention).detach()}
    results["refusals"] = _refusals(SPLITS[0].inputs(), CUTS[world], rank)
    dist.barrier()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of every rank; the processes are started once for all tests."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    run_ranks(work, request.param, request.param, folder)
    return [torch.load(Path(folder) / f"rank{r}.pt") for r in range(request.param)]


def error_of(oracle: Oracle, name: str, actual: Tensor) -> float:
    """The largest error, relative to the largest element if that is above 1."""
    assert torch.isfinite(actual).all(), name
    complaint = oracle.complaint(name, actual)
    assert complaint is None, complaint
    expected = oracle.exact[name]
    assert expected is not None
    return (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())


def gathered(split: Split, results: list[dict], whole: Inputs) -> dict[str, Tensor | None]:
    """The ranks' gradients of their own documents, put together as one process has them."""
    scores = None
    if results[0]["scores"] is not None:
        scores = torch.zeros_like(whole.tensors["scores"])
        for result in results:
            scores[..., result["columns"]] += result["scores"]
    merged: dict[str, Tensor | None] = {"scores": scores}
    for name in ("prefix_key", "prefix_value"):
        parts = [r[name] for r in results if r[name] is not None]
        merged[name] = torch.cat(parts, 2) if parts else None
    return merged


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_equals_one_process(split: Split, ranks: list[dict]) -> None:
    whole = split.inputs()
    oracle = Oracle.of(whole, split.needs)
    expected = oracle.exact
    results = [r[split.case.name] for r in ranks]
    errors = []
    for name in ("output", "query", "key", "value"):
        for rank, result in enumerate(results):
            if expected[name] is None:
                assert result[name] is None, f"{name} on rank {rank}: nobody asked for it"
                continue
            errors.append(error_of(oracle, name, result[name]))
            assert torch.equal(result[name], results[0][name]), f"{name} differs between ranks"
    for name, actual in gathered(split, results, whole).items():
        assert (actual is None) == (expected[name] is None), name
        if actual is not None:
            errors.append(error_of(oracle, name, actual))
    if len(ranks) > 2:
        what = "documents split over ranks"
        record(what, case=split.case.name, ranks=len(ranks), largest_error=max(errors))


def test_float32_and_autocast(ranks: list[dict]) -> None:
    inputs = SPLITS[0].inputs(torch.float32)
    single, half = Oracle.of(inputs), Oracle.of(inputs.cast(torch.bfloat16), ())
    for result in ranks:
        for name in ("output", "query", "key", "value"):
            error_of(single, name, result["float32"][name])
        assert result["autocast"]["output"].dtype == torch.bfloat16
        error_of(half, "output", result["autocast"]["output"])


@pytest.mark.parametrize(
    "name, forward, backward",
    [
        ("base", [2, 2, 0], [1, 0]),
        ("base-bias", [2, 2, 0], [0]),
        ("base-mass_0.6", [2, 2, 0], [1, 0]),
        ("only_scores", [2, 2, 0], [1]),
        ("only_scores-bias", [2, 2, 0], []),
    ],
)
def test_what_travels(name: str, forward: list[int], backward: list[int], ranks) -> None:
    """In numbers per row and head; 0 stands for ``D``. Reweight adds one per batch element."""
    case = next(s.case for s in SPLITS if s.case.name == name)
    rows = case.batch * case.query_heads * case.rows
    expected = [rows * (n or case.head_dim) for n in forward + backward]
    if case.mode == "reweight":
        expected[:2] = [n + case.batch for n in expected[:2]]
    for result in ranks:
        assert result[name]["sums"] == expected


def test_the_model_of_many_gpus_counts_what_travels(ranks: list[dict]) -> None:
    from benchmarks.parallel_model import partial_numbers

    case = SPLITS[0].case
    numbers = case.batch * partial_numbers(case.query_heads, case.head_dim, case.rows)
    for result in ranks:
        assert sum(result["base"]["sums"]) == numbers + 2 * case.batch


def test_neither_traffic_nor_memory_grow_with_documents(ranks: list[dict]) -> None:
    few, many = long_split(4), long_split(64)
    case = many.case
    rows = case.batch * case.query_heads * case.rows
    for result in ranks:
        assert result[few.case.name]["sums"] == result[many.case.name]["sums"]
        for split in (few, many):
            documents = len(split.case.spans) // len(ranks) + 1
            # The inputs themselves, a row's state, and the membership of a block's keys.
            own = split.inputs().tensors["prefix_key"].numel() // len(ranks)
            membership = case.batch * split.keys_at_a_time * documents
            bound = max(own, rows * max(documents, case.head_dim, split.keys_at_a_time), membership)
            assert bound < rows * case.prefix // len(ranks)
            assert result[split.case.name]["largest"] <= bound


def test_ranks_refuse_together(ranks: list[dict]) -> None:
    for rank, result in enumerate(ranks):
        said = result["refusals"]
        own = "attention_mask must" if rank == 1 else "another rank of group refused"
        assert own in said["spans of rank 1"]
        assert "document_mass" in said["different masses"]
        assert "requires a gradient" in said["different needs"]


def test_needs_a_process_group() -> None:
    inputs = SPLITS[0].inputs()
    with pytest.raises(ValueError, match="group must be a process group"):
        inputs.call(context_parallel_attention)


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_refuses_what_it_cannot_split() -> None:
    local = make_inputs(Case("local", spans=((2, 7), (40, 43)), prefix=40, local=9))
    with pytest.raises(ValueError, match=r"spans must lie in this rank's prefix of 40 keys"):
        local.call(context_parallel_attention)
    rows = make_inputs(Case("rows", spans=SPLITS[0].case.spans, prefix=40, local=4))
    with pytest.raises(ValueError, match=r"N >= M = 5, got N = 4"):
        rows.call(context_parallel_attention)
    without = make_inputs(Case("without"))
    with pytest.raises(TypeError, match="prefix must be"):
        without.call(context_parallel_attention)
