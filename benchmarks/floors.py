"""The least time that a GPU needs for each acceptance shape, computed before any measurement.

Three resources bound a call: matrix products (tensor cores), memory, and exponentials (the special
function units, one a pair of row and key). Products and memory traffic overlap. Exponentials
overlap with products only in kernels that interleave two tiles, so the predicted time adds them.
For dense attention on an H100 this gives 428 TFLOP/s at head size 64 and 545 at 128, between the
published figures of Triton's kernels (400 and 389) and of FlashAttention 3 (476 and 638).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cases import Case, gpu_cases
from .work import Work, backward_work, forward_work


@dataclass(frozen=True)
class Peaks:
    """Peak rates of a device.

    Attributes:
        name: of the device.
        gemm: operations per second of a large matrix product in bfloat16.
        copy: bytes per second of a large copy, read and written together.
        exponentials: per second.
    """

    name: str
    gemm: float
    copy: float
    exponentials: float


# The usual yield of a large cuBLAS product and copy on an H100 SXM (data sheet: 989 TFLOP/s and
# 3.35 TB/s), and 16 exponentials a cycle on each of 132 multiprocessors at 1.83 GHz.
# `gpu-acceptance` measures the first two and uses those.
H100 = Peaks("H100 SXM, assumed", gemm=750e12, copy=3.0e12, exponentials=3.9e12)


@dataclass(frozen=True)
class Floor:
    """Seconds that one resource alone would need.

    Attributes:
        products: of the matrix products.
        memory: of the traffic.
        exponentials: of the softmax.
    """

    products: float
    memory: float
    exponentials: float

    @property
    def predicted(self) -> float:
        return max(self.products + self.exponentials, self.memory)

    @property
    def share(self) -> float:
        """Predicted share of the ceiling, that of products or memory, whichever binds."""
        return max(self.products, self.memory) / self.predicted


def floor_of(work: Work, peaks: Peaks) -> Floor:
    """The floor of some work on a device."""
    return Floor(
        work.operations / peaks.gemm,
        work.bytes / peaks.copy,
        work.exponentials / peaks.exponentials,
    )


def floor_table(peaks: Peaks, cases: Iterable[Case] | None = None) -> str:
    """The floors as Markdown: one line for each shape, direction and set of gradients."""
    lines = [
        f"Peaks ({peaks.name}): {peaks.gemm / 1e12:.0f} TFLOP/s, {peaks.copy / 1e12:.2f} TB/s, "
        f"{peaks.exponentials / 1e12:.1f} T exponentials/s.",
        "",
        "| case | what | GFLOP | MB | products µs | memory µs | exponentials µs | predicted µs "
        "| share of ceiling |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    seen: set[tuple[str, str]] = set()
    plain = [case for case in gpu_cases() if not case.padding]
    for case in plain if cases is None else cases:
        directions = (
            ("forward", forward_work(case)),
            (f"backward, {' '.join(case.gradients)}", backward_work(case)),
        )
        for what, work in directions:
            if (case.name, what) in seen:
                continue
            seen.add((case.name, what))
            floor = floor_of(work, peaks)
            lines.append(
                f"| {case.name} | {what} | {work.operations / 1e9:,.1f} | {work.bytes / 1e6:,.1f} "
                f"| {1e6 * floor.products:,.0f} | {1e6 * floor.memory:,.0f} "
                f"| {1e6 * floor.exponentials:,.0f} | {1e6 * floor.predicted:,.0f} "
                f"| {100 * floor.share:.0f} % |"
            )
    return "\n".join(lines) + "\n"
