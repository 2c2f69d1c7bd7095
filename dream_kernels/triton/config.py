"""Tile shapes: a default for each kernel, a short list of others, and which one is fastest here."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import triton

from dream_kernels.triton.implementation import interpreted


@dataclass(frozen=True)
class Config:
    """How one kernel is built.

    Attributes:
        rows: rows of a tile.
        keys: keys of a tile.
        warps: warps of a program.
        stages: depth of the software pipeline over tiles.
        slot: documents of up to this many keys share a tile, ``keys / slot`` to a tile.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    slot: int = 16


# The compiler of triton 3.2 dies of 64 rows on Hopper that two groups of four warps share.
_ONE_GROUP = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)

# The interpreter gets tiles so small that short tests meet every path.
_INTERPRETER = Config(rows=64, keys=16, warps=4, stages=1, slot=4)

# By width of a padded head and of an element in bytes. Two accumulators of a row's width in
# registers bound rows * head size; query, keys and values in shared memory bound keys * stages to
# what a device of the family gives a block, of which 99 KB (sm_86, sm_89) is the least. The first
# of each list spills no register at head sizes 64 and 128.
_FORWARD = {
    (64, 2): (Config(128, 32, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    (128, 2): (Config(64, 32, 8, 2), Config(64, 32, 4, 3), Config(64, 64, 8, 2)),
    (256, 2): (Config(64, 32, 8, 2), Config(32, 32, 4, 2)),
    (64, 4): (Config(64, 32, 4, 2), Config(32, 32, 4, 2)),
    (128, 4): (Config(32, 32, 4, 2), Config(32, 16, 4, 2)),
    (256, 4): (Config(16, 16, 4, 2),),
}
_DOCUMENTS = {
    (64, 2): (Config(128, 64, 8, 2), Config(64, 64, 4, 3)),
    (128, 2): (Config(64, 64, 4, 2), Config(128, 32, 8, 2)),
    (256, 2): (Config(64, 32, 8, 1), Config(32, 32, 4, 1)),
    (64, 4): (Config(32, 32, 4, 2), Config(32, 16, 4, 2)),
    (128, 4): (Config(32, 16, 4, 2), Config(16, 16, 4, 2)),
    (256, 4): (Config(16, 16, 4, 1),),
}
_QUERY = {
    **_DOCUMENTS,
    (64, 2): (Config(128, 32, 8, 2), Config(64, 64, 4, 2)),
    (128, 2): (Config(64, 32, 4, 2), Config(64, 64, 8, 1)),
}
_KEYS = {
    (64, 2): (Config(32, 64, 8, 1), Config(32, 64, 4, 2), Config(64, 64, 8, 2)),
    (128, 2): (Config(32, 64, 8, 1), Config(32, 32, 4, 2)),
    (256, 2): (Config(32, 32, 8, 1), Config(32, 64, 8, 1)),
    (64, 4): (Config(32, 32, 4, 1), Config(16, 32, 4, 2)),
    (128, 4): (Config(16, 32, 4, 1), Config(16, 16, 4, 1)),
    (256, 4): (Config(16, 16, 4, 1),),
}
# Folding and splitting take registers: where they need other shapes, these have their own entry.
_AMPERE = {
    "forward": _FORWARD,
    "mass": _FORWARD,
    "documents": _DOCUMENTS,
    "query": _QUERY,
    "query-fold": {
        **_QUERY,
        (128, 2): (Config(64, 32, 8, 2), Config(64, 64, 8, 1)),
    },
    "keys": _KEYS,
}
# wgmma takes its operands from shared memory, which leaves registers for taller tiles.
_HOPPER_PARTS = {
    **_FORWARD,
    (128, 2): (Config(64, 32, 8, 2), Config(128, 32, 8, 2)),
}
_HOPPER_QUERY = {
    **_QUERY,
    (64, 2): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    (128, 2): (Config(128, 32, 8, 2), Config(64, 64, 8, 2)),
}
_HOPPER = {
    **_AMPERE,
    "forward": {
        **_FORWARD,
        (64, 2): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        (128, 2): (Config(128, 64, 8, 2), Config(128, 32, 8, 3), Config(64, 64, 8, 3)),
    },
    "forward-fold": _HOPPER_PARTS,
    "forward-split": _HOPPER_PARTS,
    "query": _HOPPER_QUERY,
    "query-fold": _HOPPER_QUERY,
    "keys": {
        **_KEYS,
        (64, 2): (Config(64, 64, 8, 2), Config(32, 64, 4, 2)),
        (128, 2): (Config(16, 64, 8, 2), Config(32, 64, 8, 1)),
        (256, 2): (Config(32, 64, 8, 1),),
    },
}

# tcgen05 accumulates in tensor memory, from where tiles come to registers whole.
_BLACKWELL = {
    **_HOPPER,
    "forward": {
        **_HOPPER["forward"],
        (128, 2): (Config(128, 32, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 3)),
    },
    "forward-split": {
        **_HOPPER_PARTS,
        (64, 2): (Config(128, 32, 8, 2), Config(64, 64, 8, 2)),
    },
    "documents": {
        **_DOCUMENTS,
        (128, 2): (Config(128, 32, 8, 2), Config(64, 64, 4, 2)),
    },
    "documents-fold": _DOCUMENTS,
    "documents-split": _DOCUMENTS,
    "query-fold": {
        **_QUERY,
        (64, 2): (Config(128, 32, 8, 2), Config(64, 64, 8, 2)),
        (128, 2): (Config(64, 32, 8, 2), Config(128, 32, 8, 2)),
    },
}
_FAMILIES = {"ampere": _AMPERE, "hopper": _HOPPER, "blackwell": _BLACKWELL}


def family(capability: int) -> str:
    """Whose tile shapes a device of a major compute capability takes; 0 for an AMD device.

    12.x, consumer Blackwell, has neither wgmma nor its successor, and 99 KB of shared memory.
    """
    return {9: "hopper", 10: "blackwell"}.get(capability, "ampere")


def padded_head(head_dim: int) -> int:
    """The power of two that a head is padded to in registers, at least what a dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def candidates(
    kernel: str, head_dim: int, dtype: torch.dtype, rows: int, family: str
) -> tuple[Config, ...]:
    """The configurations of a kernel worth timing, the default first.

    Args:
        kernel: ``"forward"``, ``"documents"``, ``"query"``, ``"keys"`` or ``"mass"``; the first
            three with ``"-fold"`` or ``"-split"`` behind if rows are folded or keys split.
        head_dim: ``D``.
        dtype: of the query.
        rows: how many could share a tile: none is made taller than that.
        family: of the device, see :func:`family`.
    """
    shapes = _FAMILIES[family]
    table = shapes.get(kernel, shapes[kernel.partition("-")[0]])[
        max(64, padded_head(head_dim)), dtype.itemsize
    ]
    if interpreted():
        table = (_INTERPRETER,)
    limit = max(16, 1 << (rows - 1).bit_length())
    fitting: dict[Config, None] = {}
    for config in table:
        height = min(config.rows, limit)
        warps = config.warps if height == config.rows else min(config.warps, 4)
        if _ONE_GROUP and family == "hopper" and kernel != "keys" and height < 128:
            warps = min(warps, 4)
        fitting[replace(config, rows=height, warps=warps)] = None
    return tuple(fitting)


def bucket(n: int) -> int:
    """The power of two at or above ``n``: sizes within a bucket share a configuration."""
    return 1 << max(n - 1, 0).bit_length()


_fastest: dict[Hashable, Config] = {}


def tuning_enabled() -> bool:
    """Whether configurations are timed; ``DREAM_KERNELS_TUNE=0`` takes the default of each."""
    return os.environ.get("DREAM_KERNELS_TUNE", "1") != "0"


def choose(
    key: tuple[Hashable, ...],
    configs: tuple[Config, ...],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """Return the fastest of ``configs``, timed once per ``key`` and kind of device.

    Timing waits for the device, so it happens at the first call of a kind only, and never while a
    CUDA graph is captured: the default serves then. A configuration that the device cannot hold
    is passed over.
    """
    if len(configs) == 1 or device.type != "cuda" or not tuning_enabled():
        return configs[0]
    key = (torch.cuda.get_device_name(device), *key)
    if key in _fastest:
        return _fastest[key]
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    from triton.runtime.errors import OutOfResources

    times: dict[Config, float] = {}
    failure: Exception | None = None
    for config in configs:
        try:
            times[config] = _milliseconds(partial(launch, config))
        except OutOfResources as error:  # noqa: PERF203
            failure = error
    if not times:
        raise RuntimeError(f"no configuration of the kernel fits {device}") from failure
    _fastest[key] = min(times, key=times.__getitem__)
    return _fastest[key]


def _milliseconds(run: Callable[[], object]) -> float:
    """Median time of a few runs, after one that compiles and one that warms up."""
    run()
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for mark in marks:
        mark.record()
        run()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return sorted(times)[len(times) // 2]
