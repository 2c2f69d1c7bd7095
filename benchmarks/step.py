"""The step suite: one whole DREAM training step, computed in different ways."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .environment import provenance
from .measure import Turn, quantiles, take_turns
from .memory import PeakMemory, measurable, spawn_environment
from .records import SCHEMA
from .step_models import STEP_MODELS, StepSetup, make_setup
from .step_ways import (
    FullSequence,
    Stopwatch,
    Way,
    gradient_of,
    make_ways,
    run_step,
    tokens,
    update,
)

Record = dict[str, Any]

# Ways of one context must agree to this in float32, before any of them is timed.
_ALLOWED_LOSS, _ALLOWED_COSINE, _ALLOWED_SIZE = 1e-4, 1e-4, 1e-3
_CHECK_BATCH = 2
_MEMORY_SECONDS = 280


@dataclass
class StepSettings:
    """How the suite runs.

    Attributes:
        model: a key of ``STEP_MODELS``.
        device: where.
        batch: queries; each brings one document into the pool.
        document_tokens: of each document.
        runs: timed rounds.
        seconds: budget of one way.
        total_seconds: budget of the suite; peak memory that does not fit is left out.
        ways: only ways whose name contains one of these; all by default.
        memory: whether peak memory is measured, on a CPU in a process for each way.
        quick: whether the figures are from a quick run.
    """

    model: str = "smollm2-135m"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 16
    document_tokens: int = 64
    runs: int = 4
    seconds: float = 20.0
    total_seconds: float = 600.0
    ways: Sequence[str] = ()
    memory: bool = True
    quick: bool = False

    def chosen_ways(self) -> list[Way]:
        """New ways; a cached one has nothing in its cache."""
        wanted = self.ways or [""]
        return [way for way in make_ways() if any(part in way.name for part in wanted)]


@dataclass
class _Outcome(Turn):
    """Results of one way; a run is the seconds of its phases."""

    way: Way
    loss: float | None = None
    gradient: Tensor | None = None
    peak: int | None = None
    models: int | None = None

    @property
    def totals(self) -> list[float]:
        return [sum(phases.values()) for phases in self.runs]


def run_steps(
    settings: StepSettings, say: Callable[[str], None], keep: Callable[[list[Record]], object]
) -> list[Record]:
    """Check, time and measure all ways.

    Args:
        settings: how.
        say: called with progress messages.
        keep: called with the records after the timing, and again with each peak of memory.

    Returns:
        One record for each way.
    """
    deadline = time.monotonic() + settings.total_seconds
    environment = provenance(settings.device)
    model = STEP_MODELS[settings.model]
    setup = make_setup(model, settings.batch, settings.document_tokens, settings.device)
    outcomes = {way.name: _Outcome(way) for way in settings.chosen_ways()}
    say("checking that losses and gradients agree, in float32")
    for name, complaint in disagreements(setup, [o.way for o in outcomes.values()]).items():
        outcomes[name].failure = ("wrong", complaint)
    for outcome in outcomes.values():
        outcome.way = next(w for w in settings.chosen_ways() if w.name == outcome.way.name)
    say("timing")
    take_turns(outcomes, partial(_time, setup), settings.runs, settings.seconds, say)
    keep(_records(setup, settings, environment, list(outcomes.values())))
    if settings.memory:
        for name, outcome in outcomes.items():
            if outcome.failure is None and time.monotonic() < deadline:
                say(f"peak memory of: {name}")
                _measure_memory(setup, settings, outcome)
                keep(_records(setup, settings, environment, list(outcomes.values())))
    return _records(setup, settings, environment, list(outcomes.values()))


def disagreements(setup: StepSetup, ways: Sequence[Way]) -> dict[str, str]:
    """Compare each way's loss and retriever gradient with the naive way of its context.

    In float32, on few rows of the batch. Returns the complaints by the name of the way.
    """
    rows, dtype = setup.rows, setup.reader.model.dtype
    base_dtypes = [p.dtype for p in setup.retriever.parameters()]
    # Far apart: alphabetical neighbours may begin with the same text, and then nothing is learnt.
    setup.rows = rows[:: max(1, len(rows) // _CHECK_BATCH)][:_CHECK_BATCH]
    setup.reader.model.float()
    setup.retriever.float()
    complaints = {}
    try:
        oracles = {
            context: _loss_and_gradient(setup, FullSequence(fused=False, context=context))
            for context in {way.context for way in ways}
        }
        for way in ways:
            loss, gradient = _loss_and_gradient(setup, way)
            expected, expected_gradient = oracles[way.context]
            cosine = cosine_similarity(gradient, expected_gradient, dim=0).item()
            size = (gradient.norm() / expected_gradient.norm()).item()
            agree = (
                abs(loss / expected - 1) <= _ALLOWED_LOSS
                and 1 - cosine <= _ALLOWED_COSINE
                and abs(size - 1) <= _ALLOWED_SIZE
            )
            if not agree:
                complaints[way.name] = (
                    f"loss {loss:.6f} for {expected:.6f}, cosine of the retriever's gradient "
                    f"{cosine:.6f}, size {size:.6f}"
                )
    finally:
        setup.rows = rows
        setup.reader.model.to(dtype)
        for parameter, before in zip(setup.retriever.parameters(), base_dtypes):
            parameter.data = parameter.data.to(before)
    return complaints


def _loss_and_gradient(setup: StepSetup, way: Way) -> tuple[float, Tensor]:
    loss = run_step(setup, way, Stopwatch(setup.device))
    gradient = gradient_of(setup)
    setup.optimizer.zero_grad()
    return loss, gradient


def _time(setup: StepSetup, outcome: _Outcome, first: bool) -> dict[str, float]:
    """Time one step; the first keeps loss and gradient."""
    watch = Stopwatch(setup.device)
    try:
        loss = run_step(setup, outcome.way, watch)
        if first:
            outcome.loss, outcome.gradient = loss, gradient_of(setup)
        update(setup, watch)
    except Exception:
        setup.optimizer.zero_grad()
        raise
    return watch.seconds


def _measure_memory(setup: StepSetup, settings: StepSettings, outcome: _Outcome) -> None:
    if settings.device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        outcome.models = torch.cuda.memory_allocated()
        _whole_step(setup, outcome.way)
        outcome.peak = torch.cuda.max_memory_allocated() - outcome.models
        return
    if not measurable():
        return
    order = {
        "model": settings.model,
        "batch": settings.batch,
        "document_tokens": settings.document_tokens,
        "way": outcome.way.name,
        "threads": torch.get_num_threads(),
    }
    try:
        process = subprocess.run(
            [sys.executable, "-m", f"{__package__}.step", json.dumps(order)],
            env=spawn_environment(), capture_output=True, text=True, check=False,
            timeout=_MEMORY_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return
    if process.returncode == 0:
        found = json.loads(process.stdout.splitlines()[-1])
        outcome.models, outcome.peak = found["models"], found["peak"]


def _worker(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    device = torch.device("cpu")
    model = STEP_MODELS[order["model"]]
    setup = make_setup(model, order["batch"], order["document_tokens"], device)
    (way,) = (w for w in make_ways() if w.name == order["way"])
    rows, setup.rows = setup.rows, setup.rows[:1]
    # Code, threads and the optimiser's state are not the step's own memory.
    _whole_step(setup, next(w for w in make_ways() if w.name == way.name))
    setup.rows = rows
    if isinstance(way, FullSequence):
        way.limit = 2  # each query frees what it has taken, so the others show nothing new
    memory = PeakMemory()
    _whole_step(setup, way)
    print(json.dumps({"models": memory.before, "peak": memory.bytes()}))


def _whole_step(setup: StepSetup, way: Way) -> None:
    watch = Stopwatch(setup.device)
    run_step(setup, way, watch)
    update(setup, watch)


def _records(
    setup: StepSetup,
    settings: StepSettings,
    environment: dict[str, Any],
    outcomes: Sequence[_Outcome],
) -> list[Record]:
    count = step_tokens(setup)
    naive = next((o for o in outcomes if o.way.name == "naive"), None)
    return [
        {
            "schema": SCHEMA,
            "suite": "step",
            "quick": settings.quick,
            "environment": environment,
            "peer": outcome.way.name,
            "status": "ok" if outcome.failure is None else outcome.failure[0],
            "reason": None if outcome.failure is None else outcome.failure[1],
            "model": settings.model,
            "dtype": str(setup.reader.model.dtype).removeprefix("torch."),
            "batch": settings.batch,
            "documents": len(setup.documents),
            "document_tokens": settings.document_tokens,
            "note": outcome.way.note,
            "tokens": count,
            **_figures(outcome, naive, count),
        }
        for outcome in outcomes
    ]


def _figures(outcome: _Outcome, naive: _Outcome | None, count: int) -> Record:
    figures: Record = {
        "total": None, "phases": {}, "tokens_per_second": None, "ratio": None,
        "loss": outcome.loss, "loss_difference": None, "gradient_cosine": None,
        "gradient_size": None, "models_bytes": outcome.models, "peak_bytes": outcome.peak,
    }  # fmt: skip
    if outcome.runs:
        total = quantiles(outcome.totals)
        figures["total"] = total
        figures["tokens_per_second"] = count / total["median"]
        phases = sorted({phase for run in outcome.runs for phase in run})
        figures["phases"] = {p: quantiles([r.get(p, 0.0) for r in outcome.runs]) for p in phases}
        if naive is not None and naive.runs:
            figures["ratio"] = quantiles(naive.totals)["median"] / total["median"]
    same = naive is not None and outcome.way.context == naive.way.context
    if same and naive.gradient is not None and outcome.gradient is not None:  # type: ignore[union-attr]
        assert naive is not None and naive.loss is not None and outcome.loss is not None
        figures["loss_difference"] = outcome.loss - naive.loss
        cosine = cosine_similarity(outcome.gradient, naive.gradient, dim=0)
        figures["gradient_cosine"] = cosine.item()
        figures["gradient_size"] = (outcome.gradient.norm() / naive.gradient.norm()).item()
    return figures


def step_tokens(setup: StepSetup) -> int:
    """Tokens of one step: the pool once, queries and targets, and what the retriever encodes."""
    header, documents, queries, targets = tokens(setup)
    read = len(header) + sum(map(len, [*documents, *queries, *targets]))
    batch = setup.collator(setup.rows)
    encoded = sum(int(batch[f"{name}_attention_mask"].sum()) for name in ("query", "document"))
    return read + encoded


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
