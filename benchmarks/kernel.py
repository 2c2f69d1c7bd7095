"""The kernel suite: every peer on every case, checked, timed and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .adapters import ADAPTERS, Prepared, Refusal
from .cases import Case, Inputs, make_inputs
from .ceilings import Ceilings, measure_ceilings
from .check import Oracle, check_case, prepare
from .environment import provenance
from .measure import Clock, Times, describe_failure, paired_ratio, quantiles, race
from .memory import available_bytes, cpu_peak_bytes, gpu_peak_bytes
from .records import SCHEMA
from .work import forward_work, total_work

Record = dict[str, Any]

# Compiling FlexAttention for a CPU takes half a minute a case, and gives a forward only.
SLOW_TO_PREPARE_ON_CPU = ("flex_attention",)


@dataclass
class Settings:
    """How a suite runs.

    Attributes:
        device: where.
        peers: names of adapters.
        runs: timed rounds.
        seconds: budget of one peer in a case, after the minimum number of runs.
        total_seconds: budget of the suite; cases that do not fit are recorded as left out.
        memory: whether peak memory is measured.
        quick: whether the figures are from a quick run and no result.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: Sequence[str] = tuple(ADAPTERS)
    runs: int = 15
    seconds: float = 6.0
    total_seconds: float = 1200.0
    memory: bool = True
    quick: bool = False


def run_kernel(
    cases: Sequence[Case],
    settings: Settings,
    show: Callable[[list[Record]], object],
    suite: str,
    peers: Callable[[Case], Sequence[str]] | None = None,
) -> list[Record]:
    """Run all cases.

    Args:
        cases: in this order.
        settings: how.
        show: called with the records of every case when it is done.
        suite: the name in the records.
        peers: names of a case's adapters, instead of those in ``settings``.

    Returns:
        One record for every case and peer.
    """
    deadline = time.monotonic() + settings.total_seconds
    environment = provenance(settings.device)
    dtypes = sorted({case.dtype for case in cases})
    ceilings = measure_ceilings(settings.device, dtypes, 0.25 if settings.quick else 1.0)
    records: list[Record] = []
    prepared_before: set[tuple[str, str]] = set()
    for group in _grouped(cases):
        outcomes = [
            Outcomes(
                case,
                settings if peers is None else replace(settings, peers=peers(case)),
                environment,
                ceilings,
                suite,
            )
            for case in group
        ]
        if time.monotonic() > deadline:
            leave_out(outcomes)
        else:
            race_together(outcomes, prepared_before)
        for own in outcomes:
            show(own.records())
            records += own.records()
    return records


def _grouped(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases in turn that differ in their gradients only: their backwards are compared too."""
    groups: list[list[Case]] = []
    for case in cases:
        if groups and replace(groups[-1][0], gradients=()) == replace(case, gradients=()):
            groups[-1].append(case)
        else:
            groups.append([case])
    return groups


class Outcomes:
    """Collects the results of the peers of one case."""

    def __init__(
        self,
        case: Case,
        settings: Settings,
        environment: dict[str, Any],
        ceilings: Ceilings,
        suite: str,
    ) -> None:
        self.case, self.settings, self.ceilings = case, settings, ceilings
        self.checked_batch = check_case(case).batch
        self.suite, self.environment = suite, environment
        self.failures: dict[str, tuple[str, str]] = {}
        self.notes: dict[str, str] = {}
        self.times: dict[str, Times] = {}
        self.peaks: dict[str, int | None] = {}

    def refuse(self, name: str, reason: str, status: str = "refused") -> None:
        self.failures[name] = (status, reason)

    def prepare(self, prepared_before: set[tuple[str, str]]) -> dict[str, Prepared]:
        """Set up and check the peers; those that cannot run or are wrong are recorded as such.

        Args:
            prepared_before: (peer, dtype) of earlier cases; this case's are added.
        """
        inputs = make_inputs(self.case, self.settings.device)
        smaller = check_case(self.case)
        check_inputs = inputs
        if smaller != self.case:
            check_inputs = make_inputs(smaller, self.settings.device)
        oracle = Oracle(check_inputs)
        ready: dict[str, Prepared] = {}
        for name in self.settings.peers:
            once = self.settings.device.type == "cpu" and name in SLOW_TO_PREPARE_ON_CPU
            if once and (name, self.case.dtype) in prepared_before:
                self.refuse(name, "left out: takes half a minute to compile for a CPU")
                continue
            try:
                prepared = self._prepare_one(name, oracle, check_inputs, inputs)
            except Exception as error:
                self.refuse(name, describe_failure(error), "failed")
                continue
            if prepared is not None:
                prepared_before.add((name, self.case.dtype))
                ready[name] = prepared
                self.notes[name] = prepared.note
        return ready

    def _prepare_one(
        self, name: str, oracle: Oracle, check_inputs: Inputs, inputs: Inputs
    ) -> Prepared | None:
        available = available_bytes(self.settings.device)
        prepared = prepare(ADAPTERS[name], check_inputs, available)
        if isinstance(prepared, Refusal):
            self.refuse(name, prepared.reason)
            return None
        complaint = oracle.complaint(ADAPTERS[name], prepared)
        if complaint is not None:
            self.refuse(name, complaint, "wrong")
            return None
        if check_inputs is not inputs:
            prepared = prepare(ADAPTERS[name], inputs, available)
        if isinstance(prepared, Refusal):
            self.refuse(name, prepared.reason)
            return None
        return prepared

    def take(self, times: dict[str, Times]) -> None:
        """Keep the times of a race; a peer that failed in it is recorded as such."""
        self.times = times
        for name, own in times.items():
            if own.failure is not None:
                self.refuse(name, own.failure, "failed")

    def measure_memory(self, ready: dict[str, Prepared]) -> None:
        """Measure the peak memory of the peers that ran."""
        alive = [name for name in ready if name not in self.failures]
        if self.settings.device.type == "cuda":
            self.peaks = {name: gpu_peak_bytes(ready[name]) for name in alive}
            return
        # A compiled peer would be compiled again in the process that measures its memory.
        names = [name for name in alive if name not in SLOW_TO_PREPARE_ON_CPU]
        self.peaks = cpu_peak_bytes(self.case, names, torch.get_num_threads())

    def base(self) -> Times | None:
        """The times of our fastest implementation, the baseline of the others."""
        for name in ADAPTERS:
            if name in self.times and name.startswith("ours") and name not in self.failures:
                return self.times[name]
        return None

    def records(self) -> list[Record]:
        return [self._record(name) for name in self.settings.peers]

    def _record(self, name: str) -> Record:
        case, times = self.case, self.times.get(name)
        status, reason = self.failures.get(name, ("ok", None))
        record: Record = {
            "schema": SCHEMA,
            "suite": self.suite,
            "quick": self.settings.quick,
            "environment": self.environment,
            "ceilings": self.ceilings.record(),
            "case": case.record(),
            "checked_batch": self.checked_batch,
            "peer": name,
            "computes": ADAPTERS[name].computes(case),
            "status": status,
            "reason": reason,
            "note": self.notes.get(name, ""),
            "peak_bytes": self.peaks.get(name),
            **dict.fromkeys(_FIGURES),
        }
        if status == "ok" and times is not None:
            record |= figures(case, times, self.base(), self.ceilings)
        return record


_FIGURES = (
    "forward", "backward", "total", "ratio", "operations_per_second", "bytes_per_second",
    "share_of_ceiling", "forward_share_of_gemm",
)  # fmt: skip


def figures(case: Case, times: Times, base: Times | None, ceilings: Ceilings) -> Record:
    """The figures derived from a peer's times.

    Rates and shares count the work of the case itself: what a peer computes beyond it, such as the
    gradients of a frozen prefix, does not count.
    """
    full = bool(times.backward) or not case.gradients
    work = total_work(case) if times.backward else forward_work(case)
    seconds = quantiles(times.total)["median"]
    gemm = ceilings.gemm.get(case.dtype)
    share = None
    if gemm and ceilings.copy:
        share = max(work.operations / gemm, work.bytes / ceilings.copy) / seconds
    forward = quantiles(times.forward)
    return {
        "forward": forward,
        "backward": quantiles(times.backward) if times.backward else None,
        "total": quantiles(times.total) if full else None,
        "ratio": None if base is None else paired_ratio(times, base),
        "operations_per_second": work.operations / seconds,
        "bytes_per_second": work.bytes / seconds,
        "share_of_ceiling": share,
        "forward_share_of_gemm": (
            forward_work(case).operations / forward["median"] / gemm if gemm else None
        ),
    }


def race_together(outcomes: Sequence[Outcomes], prepared_before: set[tuple[str, str]]) -> None:
    """Run the peers of several cases in one race, so that the cases are comparable, too."""
    settings = outcomes[0].settings
    ready = [own.prepare(prepared_before) for own in outcomes]
    racers = {
        f"{name} {place}": prepared
        for place, peers in enumerate(ready)
        for name, prepared in peers.items()
    }
    times = race(racers, Clock(settings.device), settings.runs, settings.seconds)
    for place, own in enumerate(outcomes):
        own.take({name: times[f"{name} {place}"] for name in ready[place]})
        if settings.memory:
            own.measure_memory(ready[place])


def leave_out(outcomes: Sequence[Outcomes]) -> None:
    """Record for all peers that there was no time for them."""
    for own in outcomes:
        for name in own.settings.peers:
            own.refuse(name, f"left out: the suite's {own.settings.total_seconds:.0f} s are up")


def choose_peers(names: Iterable[str] | None) -> list[str]:
    """Adapters by name or by the beginning of their names.

    Raises:
        ValueError: a name matches no adapter.
    """
    if not names:
        return list(ADAPTERS)
    chosen = []
    for wanted in names:
        found = [name for name in ADAPTERS if name.startswith(wanted)]
        if not found:
            raise ValueError(f"no peer is called {wanted!r}; there are: {'; '.join(ADAPTERS)}")
        chosen += [name for name in found if name not in chosen]
    return chosen
