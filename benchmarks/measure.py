"""Paired, alternating timings in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .adapters import Prepared

TurnT = TypeVar("TurnT", bound="Turn")

MIN_RUNS = 3
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's second-level cache
_FLUSHES = 12  # a millisecond at 3 TB/s: longer than launching one call takes


@dataclass
class Times:
    """Seconds of every run of one peer.

    Attributes:
        forward: one a run.
        backward: one a run; empty where the peer has no backward.
        rounds: the round of each run; runs of one round are paired.
        failure: why the peer stopped, or None.
    """

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    failure: str | None = None

    @property
    def total(self) -> list[float]:
        if not self.backward:
            return self.forward
        return [f + b for f, b in zip(self.forward, self.backward)]


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """Return what ``function`` returns and the seconds it took."""
        if self._flush is None:
            start = time.perf_counter()
            result = function()
            return result, time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the device is busy the call is queued, so the time is the device's own.
        for _ in range(_FLUSHES):
            self._flush.zero_()
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize(self.device)
        return result, begin.elapsed_time(end) / 1e3


class ProcessorClock(Clock):
    """Times by the processor time of this process, which others on the machine disturb less."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        start = time.process_time()
        result = function()
        return result, time.process_time() - start


@dataclass
class Turn:
    """Something that takes turns with others.

    Attributes:
        runs: what its timed runs gave.
        spent: seconds of all its runs.
        failure: its status in records and why it stopped, or None.
    """

    runs: list[Any] = field(init=False, default_factory=list)
    spent: float = field(init=False, default=0.0)
    failure: tuple[str, str] | None = field(init=False, default=None)


def take_turns(
    turns: dict[str, TurnT],
    run: Callable[[TurnT, bool], Any],
    runs: int,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Run all once per round, in their order.

    The first round warms up; it counts only for what is so slow that this makes no difference.

    Args:
        turns: by name.
        run: runs one of them and returns what is kept; told whether this is the first round.
        runs: rounds after the first.
        seconds: budget of each.
        say: called with progress messages.
    """
    for number in range(runs + 1):
        for name, turn in turns.items():
            if turn.failure is not None or (turn.runs and turn.spent > seconds):
                continue
            start = time.perf_counter()
            try:
                result = run(turn, not number)
            except Exception as error:
                turn.failure = ("failed", describe_failure(error))
                continue
            turn.spent += time.perf_counter() - start
            if number or turn.spent > seconds:
                turn.runs.append(result)
            if not number:
                say(f"first run of: {name}, {turn.spent:.1f} s")


def race(
    peers: dict[str, Prepared], clock: Clock, runs: int, seconds: float, calls: int = 1
) -> dict[str, Times]:
    """Run all peers once per round, in a new order every round.

    Args:
        peers: by name.
        clock: of the device where they run.
        runs: rounds after the warm-up.
        seconds: budget of one peer; beyond it a peer stops at ``MIN_RUNS`` runs.
        calls: repetitions inside one timing, for calls of microseconds.
    """
    times = {name: Times() for name in peers}
    spent = dict.fromkeys(peers, 0.0)
    order = random.Random(0)
    for number in range(runs + 1):
        for name in order.sample(list(peers), len(peers)):
            record = times[name]
            enough = len(record.rounds) >= MIN_RUNS and spent[name] > seconds
            if record.failure is not None or enough:
                continue
            start = time.perf_counter()
            try:
                forward, backward = _run(peers[name], clock, calls)
            except Exception as error:
                record.failure = describe_failure(error)
                continue
            spent[name] += time.perf_counter() - start
            if number:  # round 0 warms up
                record.rounds.append(number)
                record.forward.append(forward)
                if backward is not None:
                    record.backward.append(backward)
    return times


def _run(peer: Prepared, clock: Clock, calls: int) -> tuple[float, float | None]:
    backward = peer.backward
    if calls > 1:
        outputs, forward_seconds = clock(lambda: [peer.forward() for _ in range(calls)])
        if backward is None:
            return forward_seconds / calls, None
        _, backward_seconds = clock(lambda: [backward(output) for output in outputs])
        return forward_seconds / calls, backward_seconds / calls
    if backward is None:
        with torch.no_grad():
            return clock(peer.forward)[1], None
    output, forward_seconds = clock(peer.forward)
    return forward_seconds, clock(lambda: backward(output))[1]


def describe_failure(error: BaseException) -> str:
    """One line that says what went wrong; running out of memory is named as such."""
    text = str(error).strip().splitlines()
    line = text[0][:200] if text else type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in line:
        return f"out of memory: {line}"
    return f"{type(error).__name__}: {line}"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and number of some timings."""
    ordered = sorted(values)
    if len(ordered) == 1:
        lower = upper = ordered[0]
    else:
        lower, _, upper = statistics.quantiles(ordered, n=4, method="inclusive")
    return {
        "median": statistics.median(ordered),
        "lower": lower,
        "upper": upper,
        "least": ordered[0],
        "runs": len(ordered),
    }


def paired_ratio(times: Times, base: Times) -> float | None:
    """Median over the common rounds of this peer's time over the base's."""
    own = dict(zip(times.rounds, times.total))
    other = dict(zip(base.rounds, base.total))
    common = own.keys() & other.keys()
    if not common or bool(times.backward) != bool(base.backward):
        return None
    return statistics.median(own[i] / other[i] for i in common)
