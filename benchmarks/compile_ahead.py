"""Compiles the kernels of the GPU acceptance before there is a GPU.

``python -m benchmarks compile-ahead`` makes every call of the acceptance with launches stubbed, but
compiles what they would launch. A process on the GPU with the same version of Triton, the same
checkout and this ``TRITON_CACHE_DIR`` finds each kernel compiled.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .adapters import ADAPTERS, Refusal
from .cases import Case, gpu_cases, make_inputs
from .check import run
from .sanitized import checked_cases
from .stubbed import PEER, stub_launches

# Streaming multiprocessors, on which the number of splits depends.
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


def acceptance_cases() -> list[Case]:
    """The cases that stages time or check, each kind of call once."""
    return [*gpu_cases(), *checked_cases()]


def compile_cases(
    arch: str, cache: Path, cases: Sequence[Case], processes: int = 1
) -> tuple[int, float]:
    """Compile what the cases launch.

    Args:
        arch: ``"sm_90"``, say.
        cache: the ``TRITON_CACHE_DIR``.
        cases: of the acceptance.
        processes: that compile.

    Returns:
        How many kernels the folder holds now, and the seconds that it took.

    Raises:
        ValueError: ``arch`` is no NVIDIA architecture from sm_80 on.
    """
    if not arch.removeprefix("sm_").isdigit() or int(arch.removeprefix("sm_")) < 80:
        raise ValueError(f"arch must be sm_80 or newer, got {arch!r}")
    start = time.monotonic()
    # Triton reads these when it is imported, which a spawned process does first.
    own = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "DREAM_KERNELS_TUNE": "0"}
    before = dict(os.environ)
    os.environ.update(own)
    try:
        with ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_prepare, initargs=(arch,)
        ) as pool:
            list(pool.map(_compile_case, cases))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return len(list(cache.glob("*/*.cubin"))), time.monotonic() - start


def _prepare(arch: str) -> None:
    capability = int(arch.removeprefix("sm_"))
    stub_launches(capability, _PROCESSORS.get(arch, 132), compiled=True)


def _compile_case(case: Case) -> None:
    """Make one call; its tensors are allocated only, which takes no time and no memory."""
    prepared = ADAPTERS[PEER].setup(make_inputs(case, draw=False))
    if isinstance(prepared, Refusal):
        raise ValueError(prepared.reason)
    run(prepared)


def main(arch: str, cache: str, processes: str) -> None:
    count, seconds = compile_cases(arch, Path(cache), acceptance_cases(), int(processes))
    print(f"{count} kernels in {seconds:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
