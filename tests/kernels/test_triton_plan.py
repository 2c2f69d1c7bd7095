"""The plan of a reading, entry by entry, against a plain one in numpy; and who shares it."""

from __future__ import annotations

import gc
import random
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch

from dream_kernels import api, document_attention
from dream_kernels.problem import Problem, Reading
from helpers.cases import Case, make_inputs
from helpers.soak_record import SOAK

triton = pytest.importorskip("triton", reason="triton is not installed")

from dream_kernels.triton import launch, plan, work_list
from dream_kernels.triton.blocks import (
    COUNTS,
    FIRST,
    FIRST_KEY,
    FIRST_ROW,
    LAST,
    LIKE_FIRST,
    N_REST,
    N_REST_PREFIX,
    N_SHORT_LOCAL,
    N_SHORT_PREFIX,
    N_TILES,
    PADDED,
)
from dream_kernels.triton.plan import Plan

ON_GPU = torch.cuda.is_available()
if not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    pytest.skip(
        "the interpreter of triton 3.2 stores 32-bit integers as 64-bit ones; 3.6 is known to work",
        allow_module_level=True,
    )
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
KEYS, SLOT = 16, 4
KINDS = ("disjoint", "short", "absent", "overlapping", "anywhere")
UNWRITTEN = -(1 << 30)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few keys and documents take several programs and passes."""
    monkeypatch.setattr(plan, "LISTED_KEYS", 16)
    monkeypatch.setattr(plan, "LISTED_TILES", 4)
    monkeypatch.setattr(plan, "LISTED_DOCUMENTS", 16)


@pytest.fixture(autouse=True)
def unwritten_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def unwritten(*shape, **options) -> torch.Tensor:
        tensor = empty(*shape, **options)
        return tensor if tensor.is_floating_point() else tensor.fill_(UNWRITTEN)

    monkeypatch.setattr(torch, "empty", unwritten)


def random_spans(kind: str, documents: int, length: int, draw: random.Random) -> list:
    if kind == "absent":
        return [(0, 0)] * documents
    if kind == "anywhere":
        return [
            (draw.randint(-9, length + 9), draw.randint(-9, length + 9)) for _ in range(documents)
        ]
    if kind == "overlapping":
        spans = []
        for _ in range(documents):
            start = draw.randint(0, length)
            spans.append((start, min(length, start + draw.randint(0, 40))))
        return spans + spans[:1]
    if kind == "short":
        edges = list(range(length + 1))[-documents - 1 :]
        spans = list(pairwise(edges))
    else:
        edges = sorted(draw.sample(range(length + 1), min(2 * documents, (length + 1) // 2 * 2)))
        spans = list(zip(edges[::2], edges[1::2]))
    spans = [span if draw.random() < 0.8 else (0, 0) for span in spans] or [(0, 0)]
    draw.shuffle(spans)
    return spans


def random_problem(kind: str, seed: int) -> Problem:
    draw = random.Random(f"{kind} {seed}")
    batch, prefix, local = draw.randint(1, 3), draw.choice((0, 7, 40, 97)), draw.randint(1, 60)
    length, rows = prefix + local, draw.randint(1, 9)
    own = [random_spans(kind, draw.choice((1, 3, 20, 40)), length, draw) for _ in range(batch)]
    if draw.random() < 0.5:
        own = [own[0]] * batch
    most = max(map(len, own))
    spans = torch.tensor([row + [(0, 0)] * (most - len(row)) for row in own], device=DEVICE)
    spans *= (spans[..., 1] > spans[..., 0])[..., None]  # as build_problem leaves them
    mask = positions = None
    if draw.random() < 0.5:
        mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
        for row in mask if draw.random() < 0.5 else mask[:1].expand(batch, -1):
            row[draw.sample(range(length), draw.randint(0, length) // 4)] = False
        mask = mask.contiguous()
    if draw.random() < 0.5:
        positions = torch.arange(length, device=DEVICE).repeat(batch, 1)
        positions[-1] += draw.choice((0, 5))
    q, k = (torch.zeros(batch, 1, n, 16, device=DEVICE) for n in (rows, local))
    p = torch.zeros(batch, 1, prefix, 16, device=DEVICE) if prefix else None
    return Problem(
        q, k, k, torch.zeros(batch, 1, most, device=DEVICE), p, p, None, spans, mask, positions,
        (True,), "reweight", None, 1.0, causal=draw.random() < 0.7,
        window=None if positions is None else 5,
    )  # fmt: skip


def expected_of(problem: Problem, b: int) -> dict:
    """The plan of a batch element by loops; the later of documents that overlap loses keys."""
    length, prefix, rows = problem.total_length, problem.prefix_length, problem.rows
    mask = (
        np.ones((problem.batch, length), bool)
        if problem.mask is None
        else problem.mask.cpu().numpy()
    )
    segment = np.full(length, problem.documents)
    tiles, front, back, starts, reach = [], [], [], [], 0
    spans = problem.spans.cpu().numpy()
    for doc in np.argsort(spans[b, :, 0], kind="stable"):
        start, end = np.clip(spans[b, doc], 0, length).tolist()
        start, reach = max(start, reach), max(reach, end)
        if start >= reach:
            continue
        segment[start:reach] = doc
        starts.append(start)
        across = start < prefix < reach
        if reach - start <= SLOT and not across:
            (front if reach <= prefix else back).append((doc, start, reach - start))
            continue
        parts = [(start, prefix), (prefix, reach)] if across else [(start, reach)]
        cuts = [(k, min(KEYS, e - k)) for s, e in parts for k in range(s, e, KEYS)]
        for i, (key, n) in enumerate(cuts):
            flags = FIRST.value * (i == 0) + LAST.value * (i == len(cuts) - 1)
            flags += PADDED.value * (not mask[b, key : key + n].all())
            tiles.append((key, n, doc, flags))
    rest = np.flatnonzero(segment == problem.documents)
    first_row = 0 if not problem.causal else max(reach - (length - rows), 0)
    alike = reach <= prefix and (spans[b].clip(0, length) == spans[0].clip(0, length)).all()
    alike = alike and (mask[b, :prefix] == mask[0, :prefix]).all()
    if problem.positions is not None:
        positions = problem.positions.cpu().numpy()
        alike = alike and (positions[b, :prefix] == positions[0, :prefix]).all()
    counts = {
        N_TILES: len(tiles), N_SHORT_PREFIX: len(front), N_SHORT_LOCAL: len(back),
        N_REST_PREFIX: (rest < prefix).sum(), N_REST: len(rest), LIKE_FIRST: alike,
        FIRST_ROW: first_row if starts else rows,
    }  # fmt: skip
    if problem.window is not None:
        counts[FIRST_KEY] = min(starts, default=length)
    return {
        "tiles": tiles, "front": front, "back": back[::-1], "rest": rest.tolist(),
        "segment": segment.tolist(), "counts": {k.value: int(v) for k, v in counts.items()},
    }  # fmt: skip


def found_of(problem: Problem, made: Plan, b: int) -> dict:
    lists = made.documents_in_tiles(KEYS, SLOT)
    rest, segment = (
        getattr(made, name).view(problem.batch, -1)[b].tolist() for name in ("rest", "segment")
    )
    counts = lists.counts.tolist()[b * COUNTS.value :][: COUNTS.value]
    shorts = lists.shorts.view(-1, 4)[b * problem.documents :][: problem.documents, :3].tolist()
    shorts = [tuple(short) for short in shorts]
    n_rest = counts[N_REST.value]
    assert set(rest[n_rest:]) <= {UNWRITTEN}
    tiles = lists.tiles.view(-1, 4)[b * lists.limit :][: counts[N_TILES.value]].tolist()
    return {
        "tiles": [tuple(tile) for tile in tiles],
        "front": shorts[: counts[N_SHORT_PREFIX.value]],
        "back": shorts[len(shorts) - counts[N_SHORT_LOCAL.value] :],
        "rest": rest[:n_rest],
        "segment": segment,
        "counts": {i: n for i, n in enumerate(counts) if n != UNWRITTEN},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_plan_is_what_loops_make(kind: str) -> None:
    for seed in range(100 if SOAK or ON_GPU else 5):
        problem = random_problem(kind, seed)
        made = Plan.of(problem)
        for b in range(problem.batch):
            found, expected = found_of(problem, made, b), expected_of(problem, b)
            for name, entries in expected.items():
                assert found[name] == entries, (seed, b, name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched to make lists."""
    names: list[str] = []
    run = plan.run
    assert launch.run is run

    def recorded(kernel, *arguments, **options) -> None:
        if kernel is not work_list.weights_kernel:
            names.append(kernel.fn.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(plan, "run", recorded)
    return names


ONCE = ["list_documents_kernel", "list_keys_kernel"]
CASE = Case("shared", batch=2, query_heads=1, key_heads=1, rows=4, prefix=19, local=8)


def attend(inputs, reading: Reading, **changes) -> torch.Tensor:
    tensors = dict(inputs.tensors)
    prefix = tensors.pop("prefix_key"), tensors.pop("prefix_value")
    options = {"heads": None, "document_mass": None, "mode": "reweight", **inputs.options}
    return api.attend(
        reading,
        "triton",
        **tensors,
        **{"spans": inputs.spans, "prefix": prefix, **options, **changes},
    )


def test_layers_and_backwards_share_one_plan(launched: list[str]) -> None:
    reading = Reading()
    layers = [make_inputs(CASE, torch.float32, seed).to(DEVICE).require_grad() for seed in (0, 1)]
    outputs = [attend(layer, reading, spans=layers[0].spans) for layer in layers]
    assert launched == ONCE
    for layer, output in zip(layers, outputs):
        output.backward(layer.grad_output)
    assert launched == [*ONCE, "list_keys_kernel"]  # the documents of the keys, for dK and dV


def test_a_call_alone_shares_its_plan_with_its_backward(launched: list[str]) -> None:
    inputs = make_inputs(CASE, torch.float32).to(DEVICE).require_grad(("query", "scores"))
    output = inputs.call(document_attention, impl="triton")
    output.backward(inputs.grad_output, retain_graph=True)
    assert launched == ONCE
    # A second backward makes its own: the first dropped it.
    output.backward(inputs.grad_output)
    assert launched == ONCE * 2


def test_other_tile_shapes_share_the_rest(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Plan.of(random_problem("disjoint", 1))
    narrow, wide = (made.documents_in_tiles(keys, SLOT) for keys in (KEYS, 2 * KEYS))
    assert launched == ONCE * 2
    assert made.documents_in_tiles(KEYS, SLOT) is narrow
    assert wide.limit < narrow.limit


def test_spans_and_padding_that_changed_in_place_get_another_plan(launched: list[str]) -> None:
    inputs = make_inputs(CASE, torch.float32).to(DEVICE)
    mask = torch.ones(2, 27, dtype=torch.bool, device=DEVICE)
    mask[:, -1] = False
    reading = Reading()
    attend(inputs, reading, attention_mask=mask)
    expected = []
    for tensor in (inputs.spans, mask):
        tensor[0, 0] = 0
        found = attend(inputs, reading, attention_mask=mask)
        expected.append(attend(inputs, Reading(), attention_mask=mask))
        assert torch.equal(found, expected[-1])
    assert not torch.equal(*expected)
    assert launched == ONCE * 5


def test_a_plan_lives_no_longer_than_its_reading_and_graph() -> None:
    inputs = make_inputs(CASE, torch.float32).to(DEVICE).require_grad()
    reading = Reading()
    output = attend(inputs, reading)
    alive = weakref.ref(next(m for _, m in reading._kept.values() if isinstance(m, Plan)))
    del reading
    gc.collect()
    assert alive() is not None  # for the backward
    output.backward(inputs.grad_output)
    gc.collect()
    assert alive() is None and output.grad_fn is not None
