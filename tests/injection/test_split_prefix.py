"""A reader whose pool of documents is split over two ranks against one that reads them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dream_kernels import inject_attention, read_independently
from helpers.injected_models import VOCABULARY, make_model, target_loss
from helpers.own_process import run_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)

HEADS = {0: [1], 1: [0, 3, 5], 2: [2, 4]}
DOCUMENTS_OF_RANK = ([0, 1, 2], [3, 4])
WAYS = [("reweight", None), ("reweight", 0.6), ("bias", None)]
HEADER = [1]


def _batch() -> tuple:
    g = torch.Generator().manual_seed(5)
    lengths = (4, 9, 6, 13, 3)
    documents = [torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in lengths]
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    scores = 1.5 * torch.randn(2, len(documents), generator=g, dtype=torch.float64)
    return documents, ids, mask, scores


def _read(model, documents, own: list[int], first_row: int, split: bool) -> tuple:
    """Loss and gradient of this process's scores."""
    _, ids, mask, scores = _batch()
    prefix = read_independently(model, [documents[i] for i in own], header=HEADER)
    if split:
        prefix = prefix.split_over()
    scores = scores[:, own].requires_grad_()
    logits = model(
        ids, attention_mask=mask, document_scores=scores, document_prefix=prefix,
        document_first_row=first_row,
    ).logits  # fmt: skip
    is_target = (torch.arange(ids.shape[1]) >= 4).expand(len(ids), -1)
    loss = target_loss(logits, ids, is_target)
    return loss.item(), torch.autograd.grad(loss, scores)[0]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    documents = _batch()[0]
    results: dict = {}
    for mode, mass in WAYS:
        model = make_model("Llama")
        with inject_attention(model, HEADS, mode=mode, document_mass=mass):
            results[mode, mass] = [
                _read(model, documents, DOCUMENTS_OF_RANK[rank], first, True) for first in (0, 3)
            ]
    for name, impl in (("Gemma3", "auto"), ("Llama", "cpu")):
        model = make_model(name)
        with inject_attention(model, HEADS, impl=impl):
            with pytest.raises((ValueError, NotImplementedError)) as error:
                _read(model, documents, DOCUMENTS_OF_RANK[rank], 0, True)
            results[name] = str(error.value)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    run_ranks(work, 2, folder)
    return [torch.load(Path(folder) / f"rank{r}.pt") for r in range(2)]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("row", (0, 1), ids=("all_rows", "from_row_3"))
def test_equals_one_process(way: tuple, row: int, ranks: list[dict]) -> None:
    documents = _batch()[0]
    model = make_model("Llama")
    with inject_attention(model, HEADS, mode=way[0], document_mass=way[1]):
        loss, gradient = _read(model, documents, list(range(5)), (0, 3)[row], False)
    assert gradient.abs().max() > 1e-4
    for rank, own in enumerate(DOCUMENTS_OF_RANK):
        of_rank, gradient_of_rank = ranks[rank][way][row]
        assert of_rank == pytest.approx(loss, abs=1e-9)
        assert (gradient_of_rank - gradient[:, own]).abs().max() < 1e-9


def test_refuses_what_it_cannot_know(ranks: list[dict]) -> None:
    for result in ranks:
        assert "sliding window, and document_prefix is split" in result["Gemma3"]
        assert "impl='cpu' cannot read a document_prefix that is split" in result["Llama"]
