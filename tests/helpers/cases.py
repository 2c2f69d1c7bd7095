"""The cases that every implementation has to pass, as data, and their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

GRADIENTS = ("query", "key", "value", "scores", "prefix_key", "prefix_value", "sinks")
MODES = pytest.mark.parametrize(
    "mode,mass", (("reweight", None), ("reweight", 0.6), ("bias", None)), ids=str
)


@dataclass(frozen=True)
class Case:
    """One call. ``spans`` are given for one row of the batch and used for all, or per row.

    ``window`` is a number, or "tight": just long enough for the documents.
    """

    name: str
    spans: tuple = ((2, 7), (7, 12), (14, 17))
    batch: int = 2
    query_heads: int = 6
    key_heads: int = 2
    rows: int = 5
    local: int = 24
    prefix: int = 0
    prefix_batch: int = 1
    head_dim: int = 16
    mode: str = "reweight"
    document_mass: float | None = None
    heads: tuple[int, ...] | None = None
    per_head_scores: bool = False
    spread: float = 2.0
    causal: bool = True
    padding: tuple[str, ...] = ()
    scale: float | None = None
    window: int | str | None = None
    positions: bool = False
    softcap: float | None = None
    sinks: bool = False
    value_dim: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """Leaf tensors of a case and the keyword arguments that go with them."""

    tensors: dict[str, Tensor]
    spans: Tensor
    options: dict = field(default_factory=dict)
    grad_output: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype; scores stay in float32 or better."""
        score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            name: t.detach().to(score_dtype if name in ("scores", "sinks") else dtype)
            for name, t in self.tensors.items()
        }
        grad = None if self.grad_output is None else self.grad_output.to(dtype)
        return Inputs(tensors, self.spans, self.options, grad)

    def to(self, device: torch.device) -> Inputs:
        """The same call on another device."""
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        tensors = {name: t.detach().to(device) for name, t in self.tensors.items()}
        grad = None if self.grad_output is None else self.grad_output.to(device)
        return Inputs(tensors, self.spans.to(device), options, grad)

    def require_grad(self, names: tuple[str, ...] = GRADIENTS) -> Inputs:
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self

    def call(self, function, **overrides) -> Tensor:
        t = self.tensors
        prefix = (t["prefix_key"], t["prefix_value"]) if "prefix_key" in t else None
        return function(
            t["query"], t["key"], t["value"], t["scores"], self.spans,
            prefix=prefix, sinks=t.get("sinks"), **{**self.options, **overrides},
        )  # fmt: skip

    def run(self, function, **overrides) -> dict[str, Tensor | None]:
        """Output and gradients of one forward and backward."""
        for tensor in self.tensors.values():
            tensor.grad = None
        output = self.call(function, **overrides)
        if output.requires_grad:
            output.backward(self.grad_output)
        result = {name: t.grad for name, t in self.tensors.items()}
        return {"output": output.detach(), **result}


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Random tensors of the case's shapes, rounded to ``dtype``."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    b, hkv, d = case.batch, case.key_heads, case.head_dim
    dv = case.value_dim or d
    spans = torch.tensor(case.spans)
    if spans.dim() == 2:
        spans = spans.expand(b, -1, -1).contiguous()
    score_shape = (b, case.query_heads) if case.per_head_scores else (b,)
    tensors = {
        "query": normal(b, case.query_heads, case.rows, d),
        "key": normal(b, hkv, case.local, d),
        "value": normal(b, hkv, case.local, dv),
        "scores": case.spread * normal(*score_shape, spans.shape[1]),
    }
    if case.prefix:
        tensors["prefix_key"] = normal(case.prefix_batch, hkv, case.prefix, d)
        tensors["prefix_value"] = normal(case.prefix_batch, hkv, case.prefix, dv)
    if dtype in (torch.bfloat16, torch.float16):
        tensors["scores"] = tensors["scores"].float()
    length = case.prefix + case.local
    mask = None
    if case.padding:
        mask = torch.ones(b, length, dtype=torch.long)
        if "left" in case.padding:
            mask[0, :3] = 0
        if "right" in case.padding:
            mask[-1, -2:] = 0
        if "middle" in case.padding:
            mask[0, 8:10] = 0
        if "document" in case.padding:
            mask[0, spans[0, 0, 0] : spans[0, 0, 1]] = 0
        if "everything" in case.padding:
            mask[0] = 0
    options = {
        "mode": case.mode,
        "document_mass": case.document_mass,
        "heads": case.heads,
        "causal": case.causal,
        "attention_mask": mask,
        "scale": case.scale,
    }
    positions = _uneven_positions(spans, length) if case.positions else None
    if case.window is not None:
        window = case.window
        if window == "tight":
            window = _tight_window(case.rows, spans, mask, positions, length)
        options |= {"window": window, "positions": positions}
    if case.softcap is not None:
        options["softcap"] = case.softcap
    grad_output = normal(b, case.query_heads, case.rows, dv)
    if case.sinks:
        tensors["sinks"] = normal(case.query_heads).to(tensors["scores"].dtype)
    return Inputs(tensors, spans, options, grad_output)


def _uneven_positions(spans: Tensor, length: int) -> Tensor:
    """``[B, T]``: every document starts at one position, tokens before it are a little farther."""
    positions = torch.arange(length).repeat(len(spans), 1)
    for own, documents in zip(positions, spans.tolist()):
        present = [(start, end) for start, end in documents if end > start]
        if not present:
            continue
        last, base = max(end for _, end in present), 10
        own[:last] = base - 3 * torch.arange(last) % 7
        for start, end in present:
            own[start:end] = base + torch.arange(end - start)
        own[last:] = own[:last].max() + 1 + torch.arange(length - last)
    return positions


def _tight_window(
    rows: int, spans: Tensor, mask: Tensor | None, positions: Tensor | None, length: int
) -> int:
    """The shortest window in which the last row has the documents, or 5 if there is none."""
    window = 5
    for b, documents in enumerate(spans.tolist()):
        own = torch.arange(length) if positions is None else positions[b]
        for start, end in documents:
            tokens = own[start:end]
            if mask is not None:
                tokens = tokens[mask[b, start:end].bool()]
            if len(tokens):
                window = max(window, int(own[-1] - tokens.min()) + 1)
    return window


def _long(count: int, width: int, gap: int = 0) -> tuple:
    return tuple((i * (width + gap), i * (width + gap) + width) for i in range(count))


_WITH_ABSENT = (((2, 7), (9, 9), (12, 17)), ((0, 0), (0, 0), (3, 12)))

# Each case tests one rule of the contract; the name says which.
BASE_CASES = [
    Case("adjacent_and_separated_documents"),
    Case("absent_documents", spans=_WITH_ABSENT),
    Case("no_document_in_one_row", spans=(((0, 0), (5, 5)), ((3, 6), (6, 9)))),
    Case("one_token_documents", spans=((3, 4), (4, 5), (9, 10))),
    Case("documents_out_of_order", spans=((14, 17), (2, 7), (7, 12))),
    Case(
        "one_token_documents_out_of_order",
        spans=((3, 4), (12, 13), (5, 6), (16, 17), (7, 8), (18, 19), (1, 2), (10, 11)),
    ),
    Case("single_document", spans=((3, 12),)),
    Case("no_key_outside_documents", spans=((0, 8), (8, 24)), causal=False),
    Case("rows_before_and_inside_documents", rows=24),
    Case("more_rows_than_keys", rows=30),
    Case("one_row", rows=1),
    Case("one_key", rows=1, local=2, spans=((0, 1),)),
    Case("not_causal", causal=False),
    Case("few_heads_scored", heads=(1, 4)),
    Case("no_head_scored", heads=()),
    Case("scores_per_head", per_head_scores=True),
    Case("ratio_1", query_heads=3, key_heads=3),
    Case("ratio_7", query_heads=7, key_heads=1),
    Case("ratio_8", query_heads=16, key_heads=2, heads=(0, 9, 15)),
    Case("equal_scores", spread=0.0),
    Case("padding_left", padding=("left",)),
    Case("padding_right", padding=("right",)),
    Case("padding_inside_documents", padding=("middle",)),
    Case("document_of_padding_only", padding=("document",)),
    Case("row_of_padding_only", padding=("everything",)),
    Case("prefix_shared", prefix=19, local=8),
    Case("prefix_per_row", prefix=19, prefix_batch=2, local=8),
    Case("prefix_with_padding", prefix=19, local=8, padding=("left", "right", "middle")),
    Case("document_across_prefix_and_local", prefix=10, local=14, spans=((2, 7), (7, 12))),
    Case(
        "every_local_key_in_a_document", prefix=19, local=5, spans=((19, 24), (2, 9)), causal=False
    ),
    Case("prefix_and_no_local_key", prefix=19, local=0, rows=1),
    Case("own_scale", scale=0.7),
    Case("long_odd_lengths", rows=37, prefix=131, local=37, spans=_long(7, 17, 1), head_dim=64),
    Case("many_documents", rows=3, local=310, spans=_long(100, 3)),
    Case("large_head_size", head_dim=80, rows=3),
]


def _variants() -> list[Case]:
    cases = []
    for case in BASE_CASES:
        fields = {k: v for k, v in case.__dict__.items() if k not in ("name", "mode")}
        cases.append(case)
        cases.append(Case(f"{case.name}-bias", mode="bias", **fields))
        for mass in (0.6, 1.0):
            fields["document_mass"] = mass
            cases.append(Case(f"{case.name}-mass_{mass}", **fields))
    return cases


def _variants_with_options() -> list[Case]:
    """Every case with all options of the logits and the values, in each mode; some alone."""
    cases = [
        Case("softcap", softcap=1.5),
        Case("softcap_that_saturates", softcap=0.3, spread=4.0),
        Case("sinks", sinks=True),
        Case("sinks-mass_0.6", sinks=True, document_mass=0.6),
        Case("sinks-bias", sinks=True, mode="bias"),
        Case("window", window="tight", positions=True),
        Case("window_of_plain_rows", rows=24, window=6, heads=()),
        Case("window_of_plain_rows_and_positions", rows=24, window=6, heads=(), positions=True),
        Case(
            "window_over_a_prefix", rows=37, prefix=231, local=37, window=100, head_dim=64,
            spans=((170, 187), (190, 200)), heads=(0, 3), padding=("left",),
        ),
        Case(
            "window_over_a_prefix_of_documents_read_alone", rows=5, prefix=231, local=37,
            window="tight", positions=True, spans=_long(7, 17, 1), prefix_batch=2,
        ),
        Case("narrow_values", value_dim=8),
        Case("wide_values", value_dim=24, prefix=19, local=8),
    ]  # fmt: skip
    modes: tuple = (("", {}), ("-bias", {"mode": "bias"}), ("-mass_0.6", {"document_mass": 0.6}))
    for i, case in enumerate(BASE_CASES):
        given = {k: v for k, v in case.__dict__.items() if k != "name"}
        options = {"softcap": 1.5, "sinks": True, "value_dim": case.head_dim + (-8, 8)[i % 2]}
        if case.causal:
            options |= {"window": "tight", "positions": i % 3 > 0}
        cases += [
            Case(f"{case.name}-options{name}", **{**given, **options, **mode})
            for name, mode in modes
        ]
    return cases


CASES = _variants()
OPTION_CASES = _variants_with_options()
