"""Which implementation runs a problem, and why the others do not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

from dream_kernels.cpu import CpuImplementation
from dream_kernels.cuda import CudaImplementation, emulated
from dream_kernels.native import native_import_error
from dream_kernels.problem import Implementation, Problem
from dream_kernels.reference import ReferenceImplementation
from dream_kernels.triton.device import interpreted
from dream_kernels.triton.implementation import TritonImplementation

# Fastest first, as far as known: "auto" takes the first that can run the problem. Triton and CUDA
# C++ were never timed against each other on a GPU.
IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        TritonImplementation(),
        CudaImplementation(),
        CpuImplementation(),
        ReferenceImplementation(),
    )
}


@dataclass(frozen=True)
class Explanation:
    """What :func:`dream_kernels.explain` found.

    Attributes:
        chosen: name of the implementation that would run, or None when the named one cannot.
        reasons: for every implementation, in order of preference, why it was or was not chosen.
    """

    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        return "\n".join(
            f"{'->' if name == self.chosen else '  '} {name:<{width}}  {reason}"
            for name, reason in self.reasons.items()
        )


def check_impl(impl: str) -> None:
    """Raise ``ValueError`` unless ``impl`` is ``"auto"`` or names an implementation."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        known = ", ".join(map(repr, ("auto", *IMPLEMENTATIONS)))
        raise ValueError(f"impl must be one of {known}, got {impl!r}")


def explain_problem(problem: Problem, impl: str = "auto") -> Explanation:
    """Say for every implementation whether it would run ``problem``, and why."""
    check_impl(impl)
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        refusal = implementation.why_not(problem)
        if refusal is not None:
            reasons[name] = f"cannot: {refusal}"
        elif impl == "auto" and (where := _only_by_name(problem, implementation)):
            reasons[name] = f"can, {where}: only when asked for by name"
        elif impl not in ("auto", name):
            reasons[name] = f"can, but impl={impl!r} was asked for"
        elif chosen is None:
            chosen = name
            reasons[name] = "taken: " + (
                "the fastest that can run this" if impl == "auto" else "asked for by name"
            )
        else:
            reasons[name] = f"can, but {chosen!r} is preferred"
    return Explanation(chosen, reasons)


def select(problem: Problem, impl: str) -> Implementation:
    """Return the implementation that runs ``problem``.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: the named implementation cannot run ``problem``; the message says why.
    """
    check_impl(impl)
    if impl != "auto":
        refusal = IMPLEMENTATIONS[impl].why_not(problem)
        if refusal is not None:
            raise NotImplementedError(
                f"impl={impl!r} cannot run this call: {refusal}\n{explain_problem(problem, impl)}"
            )
        return IMPLEMENTATIONS[impl]
    if problem.query.device.type == "cpu" and (error := native_import_error()) is not None:
        _warn_of_missing_native(error)
    for implementation in IMPLEMENTATIONS.values():
        if implementation.why_not(problem) is None and not _only_by_name(problem, implementation):
            return implementation
    raise AssertionError("the reference implementation runs everything")


def _only_by_name(problem: Problem, implementation: Implementation) -> str | None:
    """Where an implementation for GPUs runs if that is a CPU: slowly, for tests."""
    if implementation.name == "triton" and interpreted():
        return "in triton's interpreter"
    if implementation.name == "cuda" and emulated() and problem.query.device.type == "cpu":
        return "emulated on the CPU"
    return None


@cache
def _warn_of_missing_native(error: str) -> None:
    warnings.warn(
        "the native extension of dream_kernels is not available, CPU calls use the slow "
        f"reference implementation: {error}",
        RuntimeWarning,
        stacklevel=4,
    )
