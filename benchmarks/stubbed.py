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

from torch import Tensor

from dream_kernels import api, set_value_checks
from dream_kernels.problem import Reading
from dream_kernels.triton import device, implementation

from .adapters import ADAPTERS, Prepared, Refusal
from .adapters.base import gradients_of, operator_leaves, wanted
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
ALONE = "query, scores, a call alone"
CASES[ALONE] = replace(
    _SHAPE, name="eager call alone, launches stubbed", gradients=("query", "scores")
)
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


def _stub() -> Any:
    """A compiled kernel that does nothing, in each way in which one is launched."""
    from triton.compiler import CompiledKernel

    class Nothing(CompiledKernel):
        function = module = 0
        packed_metadata, name, src = (), "nothing", None
        metadata = SimpleNamespace(shared=0, num_warps=4)
        run = staticmethod(lambda *arguments: None)

        def __init__(self) -> None:
            """There is nothing to load."""

        def __del__(self) -> None:
            """Nor to unload."""

        def result(self) -> Nothing:
            return self

    return Nothing()


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

    def instead(*arguments: Any, **options: Any) -> Any:
        if compiled:
            real(*arguments, **options)
        return _stub()

    triton.compiler.compile = instead
    vars(device).update(capability=lambda on: capability // 10, processors=lambda on: processors)
    # so that tensors on the CPU are taken, in every dtype
    implementation.TritonImplementation.why_not = lambda self, problem: None  # type: ignore[method-assign]
    set_value_checks(False)  # as on a GPU


def prepare() -> dict[str, Prepared]:
    """The calls by the gradients that they compute; all but the last are layers of one reading."""
    return {name: _prepared(case, alone=name == ALONE) for name, case in CASES.items()}


def _prepared(case: Case, alone: bool) -> Prepared:
    inputs = make_inputs(case)
    if alone:
        prepared = ADAPTERS[PEER].setup(inputs)
        if isinstance(prepared, Refusal):
            sys.exit(prepared.reason)
        return prepared
    leaves = operator_leaves(inputs, case.gradients)
    query, key, value, scores = leaves.values()
    reading = Reading()

    def forward() -> Tensor:
        return api.attend(
            reading, "triton", query, key, value, scores, inputs.spans, mode=case.mode,
            heads=case.heads, document_mass=None, scale=None, causal=True, attention_mask=None,
            prefix=inputs.prefix,
        )  # fmt: skip

    return Prepared(forward, gradients_of(wanted(leaves), inputs.grad_output))


def main(runs: int, seconds: float) -> None:
    """Print the times of each case."""
    stub_launches()
    times = race(prepare(), ProcessorClock(), runs, seconds, calls=_CALLS)
    print(json.dumps({name: asdict(own) for name, own in times.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
