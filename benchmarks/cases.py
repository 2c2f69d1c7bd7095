"""What is timed, as data: one :class:`Case` is one call of the operator with its gradients."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GRADIENTS = ("query", "key", "value", "scores")
# Of the padded cases: it begins within a tile and is longer than one.
PADDING = 72


@dataclass(frozen=True)
class Case:
    """One problem. Documents are equally long, adjacent, and start at position 0.

    Attributes:
        name: the purpose of the case; cases of one name differ in dtype or in ``gradients``.
        batch: ``B``.
        query_heads: ``Hq``.
        key_heads: ``Hkv``.
        head_dim: ``D``.
        rows: ``M``.
        prefix: ``P``; 0 for full-sequence use.
        shared: one prefix for the whole batch, or one for each batch element.
        local: ``N``.
        documents: ``C``.
        covered: how many keys the documents cover.
        dtype: of everything but the scores.
        mode: ``"reweight"`` or ``"bias"``.
        gradients: which gradients the backward computes; ``key`` and ``value`` are the local ones.
        scored: share of the heads that receive the scores, at least one unless it is 0.
        padding: how many keys at the end of every document are padding.
    """

    name: str
    batch: int = 8
    query_heads: int = 9
    key_heads: int = 3
    head_dim: int = 64
    rows: int = 64
    prefix: int = 2048
    shared: bool = True
    local: int = 64
    documents: int = 16
    covered: int = 2048
    dtype: str = "float32"
    mode: str = "reweight"
    gradients: tuple[str, ...] = GRADIENTS
    scored: float = 1.0
    padding: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 < self.documents <= self.covered < self.length:
            raise ValueError(
                f"{self.name}: {self.documents} documents over {self.covered} keys must end before "
                f"the last of {self.length} keys"
            )
        if not 0 <= self.padding < self.covered // self.documents:
            raise ValueError(
                f"{self.name}: padding must leave keys of documents of "
                f"{self.covered // self.documents}, got {self.padding}"
            )
        unknown = set(self.gradients) - set(GRADIENTS)
        if unknown:
            raise ValueError(f"{self.name}: unknown gradients {sorted(unknown)}")

    @property
    def length(self) -> int:
        """``T``, the keys of prefix and local together."""
        return self.prefix + self.local

    @property
    def heads(self) -> list[int] | None:
        """The heads that receive the scores, spread evenly; None for all."""
        if self.scored == 1.0:
            return None
        count = round(self.scored * self.query_heads)
        if self.scored and not count:
            count = 1
        return [i * self.query_heads // count for i in range(count)]

    @property
    def pairs(self) -> int:
        """Visible (row, key) pairs over batch and heads."""
        first = self.length - self.rows + 1
        per_head = self.rows * first + self.rows * (self.rows - 1) // 2
        return self.batch * self.query_heads * per_head

    def record(self) -> dict[str, Any]:
        """The case as JSON, without padding where there is none."""
        record = {**asdict(self), "gradients": list(self.gradients)}
        return record if self.padding else {k: v for k, v in record.items() if k != "padding"}


def full_sequence(name: str, length: int, **changes: Any) -> Case:
    """A case without prefix: documents fill three quarters of one causal sequence.

    The rows of the documents themselves are part of the call; they attend plainly.
    """
    return Case(name, rows=length, prefix=0, local=length, covered=length * 3 // 4, **changes)


def from_record(record: dict[str, Any]) -> Case:
    """The case that :meth:`Case.record` made ``record`` of."""
    return Case(**{**record, "gradients": tuple(record["gradients"])})


@dataclass
class Inputs:
    """The tensors of a case. No leaf requires a gradient yet; adapters decide.

    Attributes:
        case: what they are made for.
        query: ``[B, Hq, M, D]``.
        key: ``[B, Hkv, N, D]``.
        value: as ``key``.
        prefix_key: ``[1 or B, Hkv, P, D]`` or None.
        prefix_value: as ``prefix_key``.
        scores: ``[B, C]`` float32.
        spans: ``[B, C, 2]``.
        grad_output: ``[B, Hq, M, D]``.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    scores: Tensor
    spans: Tensor
    grad_output: Tensor

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def prefix(self) -> tuple[Tensor, Tensor] | None:
        if self.prefix_key is None or self.prefix_value is None:
            return None
        return self.prefix_key, self.prefix_value

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix and local keys and values in one piece, ``[B, Hkv, T, D]``."""
        if self.prefix_key is None or self.prefix_value is None:
            return key, value
        pairs = ((self.prefix_key, key), (self.prefix_value, value))
        keys, values = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in pairs)
        return keys, values

    def document_of_key(self) -> Tensor:
        """``[T]``: the document of each key, ``C`` outside all of them."""
        position = torch.arange(self.case.length, device=self.device)
        ends = self.spans[0, :, 1].contiguous()
        return torch.searchsorted(ends, position, right=True)

    def padding_mask(self) -> Tensor | None:
        """``[T]`` bool, False for padding; None without any."""
        if not self.case.padding:
            return None
        position = torch.arange(self.case.length, device=self.device)
        ends = torch.cat([self.spans[0, :, 1], self.spans.new_tensor([2 * self.case.length])])
        end = ends[self.document_of_key()]
        return position < end - self.case.padding

    def attention_mask(self) -> Tensor | None:
        """``[B, T]`` bool as the operator takes it, or None."""
        kept = self.padding_mask()
        return None if kept is None else kept.expand(self.case.batch, -1).contiguous()

    def scored_row(self) -> Tensor:
        """``[M]`` bool: the rows after every document."""
        case = self.case
        position = torch.arange(case.length - case.rows, case.length, device=self.device)
        return position >= case.covered

    def scored_head(self) -> Tensor:
        """``[Hq]`` bool: the heads that receive the scores."""
        heads = self.case.heads
        if heads is None:
            return torch.ones(self.case.query_heads, dtype=torch.bool, device=self.device)
        chosen = torch.zeros(self.case.query_heads, dtype=torch.bool, device=self.device)
        chosen[heads] = True
        return chosen

    def visible(self) -> Tensor:
        """``[M, T]`` bool: causal, and no padding."""
        kept = self.padding_mask()
        return self.causal() if kept is None else self.causal() & kept

    def causal(self) -> Tensor:
        """``[M, T]`` bool: the last row at the last key."""
        rows, length = self.case.rows, self.case.length
        ones = torch.ones(rows, length, dtype=torch.bool, device=self.device)
        return ones.tril(length - rows)

    def exact(self) -> Inputs:
        """The same numbers in float64, for the reference."""
        tensors = {
            name: None if tensor is None else tensor.detach().double()
            for name, tensor in (
                ("query", self.query),
                ("key", self.key),
                ("value", self.value),
                ("prefix_key", self.prefix_key),
                ("prefix_value", self.prefix_value),
                ("scores", self.scores),
                ("grad_output", self.grad_output),
            )
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


def make_inputs(
    case: Case, device: torch.device | str = "cpu", seed: int = 0, draw: bool = True
) -> Inputs:
    """Random inputs of a case; scores are spread like cosines over a temperature of 0.05.

    Args:
        case: what they are made for.
        device: where.
        seed: of the random numbers.
        draw: False leaves large tensors as they were allocated, for calls that compute nothing.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*size: int) -> Tensor:
        if not draw:
            return torch.empty(size, device=device, dtype=dtype)
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    rows = (case.batch, case.query_heads, case.rows, case.head_dim)
    local = (case.batch, case.key_heads, case.local, case.head_dim)
    pools = 1 if case.shared else case.batch
    prefix = (pools, case.key_heads, case.prefix, case.head_dim)
    edges = torch.linspace(0, case.covered, case.documents + 1, device=device).long()
    return Inputs(
        case=case,
        query=normal(*rows),
        key=normal(*local),
        value=normal(*local),
        prefix_key=normal(*prefix) if case.prefix else None,
        prefix_value=normal(*prefix) if case.prefix else None,
        scores=2.0 * torch.randn(case.batch, case.documents, generator=generator, device=device),
        spans=torch.stack([edges[:-1], edges[1:]], -1).expand(case.batch, -1, -1).contiguous(),
        grad_output=normal(*rows),
    )


def _in_both_dtypes(case: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype in ("float32", "bfloat16")]


def _three_backwards(case: Case) -> list[Case]:
    """The full backward, and the fast paths of the first and of the later injected layers."""
    return [
        case,
        replace(case, gradients=("query", "scores")),
        replace(case, gradients=("scores",)),
    ]


def cpu_cases() -> list[Case]:
    """The shapes of the CPU kernel's acceptance, and similar ones."""
    main = Case("shared pool")
    cases = [c for both in _in_both_dtypes(main) for c in _three_backwards(both)]
    neighbours = [
        # a step of training on a laptop: short suffixes over one pool of 1,024 tokens
        Case("laptop", batch=16, rows=48, local=48, prefix=1024, covered=1024),
        Case("pool per query", batch=4, shared=False),
        Case("one query, one row", batch=1, rows=1, local=1),
        Case("head size 128", head_dim=128),
        Case("a tenth of the heads", scored=0.1),
        Case("mode bias", mode="bias"),
        full_sequence("full sequence", batch=1, length=2048),
    ]
    return cases + [c for case in neighbours for c in _in_both_dtypes(case)]


def gpu_cases() -> list[Case]:
    """Heads of the paper's readers over pools of 4,096 and 16,384 tokens, and a full sequence."""
    models = (
        ("Qwen2.5-0.5B", 14, 2, 64),
        ("Llama-3.2-1B", 32, 8, 64),
        ("Llama-3.2-3B", 24, 8, 128),
    )
    pools = [
        Case(
            f"{model}, {documents} documents, {'shared' if shared else 'own'} pool",
            batch=16, query_heads=query_heads, key_heads=key_heads, head_dim=head_dim,
            rows=128, local=128, prefix=256 * documents, covered=256 * documents,
            documents=documents, shared=shared, dtype="bfloat16", gradients=gradients,
        )
        for model, query_heads, key_heads, head_dim in models
        for documents in (16, 64)
        for shared in (True, False)
        for gradients in (("query", "scores"), ("scores",), GRADIENTS)
    ]  # fmt: skip
    padded = [
        replace(case, name=f"{case.name}, padded", padding=PADDING)
        for case in pools
        if case.shared and case.documents == 16 and case.gradients == ("query", "scores")
        and not case.name.startswith("Llama-3.2-1B")
    ]  # fmt: skip
    return pools + padded + list(full_sequences())


def full_sequences() -> tuple[Case, Case]:
    """A sequence with scores in all heads, and in none: what remains is plain attention."""
    scored = full_sequence(
        "full sequence, 16 documents, all heads scored", 4096, batch=1, query_heads=14,
        key_heads=2, dtype="bfloat16",
    )  # fmt: skip
    return scored, replace(scored, name="full sequence, 16 documents, no head scored", scored=0.0)


def quick_cases() -> list[Case]:
    """A few small shapes to check that everything works."""
    small = Case("shared pool", batch=4, rows=32, local=32, prefix=512, covered=512)
    return [
        small,
        replace(small, dtype="bfloat16"),
        replace(small, gradients=("scores",)),
        full_sequence("full sequence", batch=1, length=256),
    ]


def rehearsal_cases() -> list[Case]:
    """The acceptance's kinds of shape, small enough for an interpreter."""
    tiny = Case(
        "rehearsal, shared pool", batch=2, query_heads=4, key_heads=2, rows=16, local=16,
        prefix=64, covered=64, documents=4, dtype="float32", gradients=("query", "scores"),
    )  # fmt: skip
    return [
        tiny,
        replace(tiny, gradients=("scores",)),
        replace(tiny, gradients=GRADIENTS),
        replace(tiny, name="rehearsal, own pool", shared=False),
    ]
