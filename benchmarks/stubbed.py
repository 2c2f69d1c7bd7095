"""The host's time of a call of the Triton kernels, on any machine: nothing is launched.

Run ``python -m benchmarks.stubbed``; it prints seconds as JSON, for each set of gradients. Checks,
choice of kernels, allocation and Triton's own dispatch run as for a Hopper GPU; compiling gives
a kernel that does nothing. Tensors are on the CPU, where PyTorch's few operations between the
launches cost what they cost.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

from dream_kernels import set_value_checks
from dream_kernels.triton import device, implementation

from .adapters import ADAPTERS, Prepared, Refusal
from .cases import Case, make_inputs
from .measure import ProcessorClock, race

PEER = "ours (triton)"
# A short call of a training step, as small as can be without being another kind of call.
_SHAPE = Case(
    "eager call, launches stubbed", batch=2, query_heads=14, key_heads=2, rows=16, local=16,
    prefix=512, covered=512, dtype="float16",
)  # fmt: skip
CASES = {
    ", ".join(gradients): replace(_SHAPE, gradients=gradients)
    for gradients in (("scores",), ("query", "scores"), _SHAPE.gradients)
}
_CALLS = 50


class _Driver:
    """An NVIDIA GPU that is asked for but never used."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class _Kernel:
    """A compiled kernel that does nothing, in each way in which one is launched."""

    function = 0
    packed_metadata = ()
    metadata = SimpleNamespace(shared=0, num_warps=4)

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None

    def result(self) -> _Kernel:
        return self

    def __getitem__(self, grid: Any) -> Any:
        return self.run


def stub_launches(capability: int = 90, processors: int = 132, compiled: bool = False) -> None:
    """From now on Triton launches nothing in this process, as on a GPU; by default a Hopper one.

    Args:
        capability: major and minor compute capability in one number.
        processors: its streaming multiprocessors.
        compiled: whether kernels are compiled all the same, into Triton's cache.
    """
    import triton.compiler
    from triton.runtime import driver

    driver.set_active(_Driver(capability))
    real = triton.compiler.compile

    def instead(*arguments: Any, **options: Any) -> _Kernel:
        if compiled:
            real(*arguments, **options)
        return _Kernel()

    triton.compiler.compile = instead
    vars(device).update(capability=lambda on: capability // 10, processors=lambda on: processors)
    # so that tensors on the CPU are taken, in every dtype
    implementation.TritonImplementation.why_not = lambda self, problem: None  # type: ignore[method-assign]
    set_value_checks(False)  # as on a GPU


def prepare() -> dict[str, Prepared]:
    """The calls by the gradients that they compute."""
    ready = {}
    for name, case in CASES.items():
        prepared = ADAPTERS[PEER].setup(make_inputs(case))
        if isinstance(prepared, Refusal):
            sys.exit(prepared.reason)
        ready[name] = prepared
    return ready


def main(runs: int, seconds: float) -> None:
    """Print the times of each case."""
    stub_launches()
    times = race(prepare(), ProcessorClock(), runs, seconds, calls=_CALLS)
    print(json.dumps({name: asdict(own) for name, own in times.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
