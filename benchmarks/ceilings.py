"""Peak rates of this machine: a large matrix product and a large copy, measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from .cases import DTYPES
from .measure import Clock

_SIZES = {"cpu": (2048, 2**28), "cuda": (8192, 2**31)}  # edge of the product, bytes of the copy
_RUNS = 5


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        gemm: operations per second by dtype.
        copy: bytes per second, read and written together.
    """

    gemm: dict[str, float] = field(default_factory=dict)
    copy: float = 0.0

    def record(self) -> dict[str, object]:
        """The rates as JSON."""
        return asdict(self)


def measure_ceilings(
    device: torch.device, dtypes: list[str], scale: float = 1.0, runs: int = _RUNS
) -> Ceilings:
    """Measure the rates; the best of a few runs counts.

    Args:
        device: where.
        dtypes: of the matrix products.
        scale: makes products and copy smaller, for a quick run.
        runs: how many.
    """
    clock = Clock(device)
    edge, size = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    edge, size = int(edge * scale), int(size * scale)
    gemm = {}
    for name in dtypes:
        a, b = (torch.randn(edge, edge, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        best = min(clock(lambda: torch.mm(a, b, out=out))[1] for _ in range(runs + 1))  # noqa: B023
        gemm[name] = 2 * edge**3 / best
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    best = min(clock(lambda: target.copy_(source))[1] for _ in range(runs + 1))
    return Ceilings(gemm, 2 * size / best)
