"""What a call costs the host: problems that cost nothing, and Triton's kernels without launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

from dream_kernels.triton.device import interpreted

from .cases import Case
from .ceilings import Ceilings
from .environment import provenance
from .kernel import SLOW_TO_PREPARE_ON_CPU, Outcomes, Record, Settings
from .measure import Clock, Times, describe_failure, race
from .stubbed import CASES, PEER

_EAGER = Case(
    "eager call", batch=1, query_heads=1, key_heads=1, head_dim=16, rows=1, prefix=8, local=1,
    documents=2, covered=8, gradients=(),
)  # fmt: skip
_CALLS = 200


def run_overhead(settings: Settings) -> list[Record]:
    """Time eager calls on problems that cost next to nothing: what remains is the call itself.

    All peers run a problem of 9 keys, without gradients and with all of them. The Triton kernels,
    with their launches stubbed, run a short call of a training step on any machine.
    """
    names = [n for n in settings.peers if n not in SLOW_TO_PREPARE_ON_CPU]
    # Triton's interpreter takes half a second a call.
    settings = replace(settings, peers=[n for n in names if n != PEER or not interpreted()])
    environment = provenance(settings.device)
    records = []
    for case in (_EAGER, replace(_EAGER, gradients=Case.gradients)):
        outcomes = Outcomes(case, settings, environment, Ceilings(), "overhead")
        ready = outcomes.prepare(set())
        clock = Clock(settings.device)
        outcomes.take(race(ready, clock, settings.runs, settings.seconds, calls=_CALLS))
        records += outcomes.records()
    if PEER in names:
        records += _stubbed(settings, environment)
    return records


def _stubbed(settings: Settings, environment: dict[str, Any]) -> list[Record]:
    """The records of ``stubbed.py``, from a process of its own, which never launches anything."""
    # With one peer that is never prepared here, and whose times come from there.
    stubbed = replace(settings, peers=[PEER])
    outcomes = {
        name: Outcomes(case, stubbed, environment, Ceilings(), "overhead")
        for name, case in CASES.items()
    }
    try:
        for name, times in _times_of_stubbed(settings).items():
            outcomes[name].notes[PEER] = "processor time of the host, launches stubbed"
            outcomes[name].take({PEER: times})
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        for own in outcomes.values():
            own.refuse(PEER, describe_failure(error), "failed")
    return [record for own in outcomes.values() for record in own.records()]


def _times_of_stubbed(settings: Settings) -> dict[str, Times]:
    command = [sys.executable, "-m", f"{__package__}.stubbed"]
    done = subprocess.run(
        [*command, str(settings.runs), str(settings.seconds)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(last[-1])
    return {name: Times(**times) for name, times in json.loads(done.stdout).items()}
