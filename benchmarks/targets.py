"""Targets, compared with the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import GRADIENTS, Case, cpu_cases, from_record, full_sequences, gpu_cases
from .scaling import fitted_exponent, series
from .work import allowed_extra_bytes

Record = dict[str, Any]

_OURS = ("ours (cuda)", "ours (triton)", "ours (cpu)")
_FLOOR = "sdpa, no scores, expanded"


@dataclass(frozen=True)
class Finding:
    """One target.

    Attributes:
        claim: what is measured.
        bound: the target.
        at_most: whether it is an upper bound.
        measured: the number in the records.
        unit: of both numbers.
    """

    claim: str
    bound: float
    at_most: bool
    measured: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def row(self) -> list[str]:
        """Claim, bound, measured, met."""
        sign = "≤" if self.at_most else "≥"
        return [
            self.claim,
            f"{sign} {self.bound:.3g}{self.unit}",
            f"{self.measured:.3g}{self.unit}",
            "yes" if self.met else "**no**",
        ]


class _Kernel:
    """Finds the figures of one case with any gradients."""

    def __init__(self, records: Iterable[Record], case: Case, gradients: tuple[str, ...]) -> None:
        wanted = {**case.record(), "gradients": list(gradients)}
        self.rows = {r["peer"]: r for r in records if r["status"] == "ok" and r["case"] == wanted}

    def ours(self) -> Record | None:
        return next((self.rows[name] for name in _OURS if name in self.rows), None)

    def ratio(self, peer: str) -> float | None:
        return self.rows[peer]["ratio"] if peer in self.rows else None


def _median(record: Record | None, figure: str) -> float | None:
    if record is None or record[figure] is None:
        return None
    return record[figure]["median"]


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def findings(records: Sequence[Record]) -> list[Finding]:
    """All targets that the records of one device cover."""
    kernel = _of_kernels(records)
    scaling = [r for r in records if r["suite"] == "scaling" and r["status"] == "ok"]
    steps = [r for r in records if r["suite"] == "step" and r["status"] == "ok"]
    found = [*_cpu(kernel), *_scaling(scaling), *_steps(steps), *_gpu(kernel)]
    return [
        Finding(claim, bound, at_most, measured, unit)
        for claim, bound, at_most, measured, unit in found
        if measured is not None
    ]


def unmeasured(records: Sequence[Record]) -> list[str]:
    """Targets of the GPU shapes in the records that lack a measurement."""
    return [claim for claim, *_, measured, _ in _gpu(_of_kernels(records)) if measured is None]


def _of_kernels(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r["suite"] in ("kernel", "acceptance")]


_Row = tuple[str, float, bool, float | None, str]


def _cpu(records: list[Record]) -> Iterable[_Row]:
    """The shared pool of the CPU kernel's acceptance, in both dtypes."""
    records = [r for r in records if r["environment"]["device_type"] == "cpu"]
    mains = [c for c in cpu_cases() if c.name == "shared pool" and c.gradients == GRADIENTS]
    for case in mains:
        full, only = _Kernel(records, case, GRADIENTS), _Kernel(records, case, ("scores",))
        ours = full.ours()
        yield (
            f"{case.dtype}: the reference's time over ours",
            4,
            False,
            full.ratio("ours (reference)"),
            "",
        )
        yield (
            f"{case.dtype}: SDPA without scores over ours, keys expanded",
            1,
            False,
            full.ratio(_FLOOR),
            "",
        )
        backward = _quotient(_median(only.ours(), "backward"), _median(ours, "backward"))
        yield f"{case.dtype}: only-scores backward over the full one", 0.5, True, backward, ""
        if ours is None:
            continue
        if ours["peak_bytes"] is not None:
            allowed = allowed_extra_bytes(case, ours["environment"]["threads"]) / 2**20
            peak = ours["peak_bytes"] / 2**20
            yield f"{case.dtype}: memory beyond inputs and outputs", allowed, True, peak, " MiB"
        if case.dtype == "float32":
            share = ours["forward_share_of_gemm"]
            yield "float32: forward's share of the GEMM rate", 0.5, False, share, ""


def _scaling(records: list[Record]) -> Iterable[_Row]:
    for peer in _OURS:
        prefix = series(records, "prefix", peer, "total")
        if len(prefix) > 1:
            span = f"{prefix[0][0]:g} to {prefix[-1][0]:g}"
            exponent = fitted_exponent(prefix)
            yield f"{peer}: exponent of time in the prefix, {span} keys", 1.05, True, exponent, ""
        times = [seconds for _, seconds in series(records, "documents", peer, "total")]
        if len(times) > 1:
            flat = max(times) / min(times)
            yield f"{peer}: slowest over fastest number of documents", 1.15, True, flat, ""


def _steps(records: list[Record]) -> Iterable[_Row]:
    for model in dict.fromkeys(r["model"] for r in records):
        ways = {r["peer"]: r for r in records if r["model"] == model}
        naive, shared = ways.get("naive"), ways.get("prefix, shared pool")
        if naive is None or shared is None:
            continue
        claim = f"{model}: a step with a shared pool, times faster than the naive one"
        yield claim, 8, False, shared["ratio"], ""
        memory = _quotient(shared["peak_bytes"], naive["peak_bytes"])
        yield f"{model}: its peak memory over the naive one's", 0.1, True, memory, ""


def _gpu(records: list[Record]) -> Iterable[_Row]:
    records = [r for r in records if r["environment"]["device_type"] == "cuda"]
    whole = full_sequences()
    known = {c.name for c in gpu_cases()} - {c.name for c in whole}
    for record in {r["case"]["name"]: r["case"] for r in records}.values():
        case = from_record(record)
        if case.name not in known:
            continue
        two = _Kernel(records, case, ("query", "scores"))
        full, only = _Kernel(records, case, GRADIENTS), _Kernel(records, case, ("scores",))
        ours, floor = two.ours(), two.rows.get(_FLOOR)
        forward = _quotient(_median(ours, "forward"), _median(floor, "forward"))
        yield f"{case.name}: forward over flash without scores", 1.10, True, forward, ""
        both = _quotient(_median(ours, "total"), _median(floor, "total"))
        yield f"{case.name}: forward and backward over flash without scores", 0.85, True, both, ""
        yield f"{case.name}: FlexAttention over ours", 3, False, two.ratio("flex_attention"), ""
        if case.padding:
            continue
        yield f"{case.name}: eager over ours", 10, False, two.ratio("eager"), ""
        eager = two.rows.get("eager")
        memory = None
        if ours is not None and eager is not None:
            memory = _quotient(ours["peak_bytes"], eager["peak_bytes"])
        yield f"{case.name}: our peak memory over eager's", 0.05, True, memory, ""
        backward = _quotient(_median(only.ours(), "backward"), _median(full.ours(), "backward"))
        yield f"{case.name}: only-scores backward over the full one", 0.4, True, backward, ""
    scored, plain = (_Kernel(records, case, GRADIENTS).ours() for case in whole)
    if scored is not None or plain is not None:
        for what, figure in (("forward", "forward"), ("forward and backward", "total")):
            ratio = _quotient(_median(scored, figure), _median(plain, figure))
            yield f"full sequence: {what} over plain attention of ours", 1.15, True, ratio, ""
