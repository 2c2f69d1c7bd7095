"""Which tile shapes suit a call, and which of them is the fastest on its device."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial

import torch

from dream_kernels.triton import device, tiles
from dream_kernels.triton.tiles import Config

# The compiler of triton 3.2 crashes on 64 rows on Hopper that two groups of four warps share.
_ONE_GROUP = device.triton_version() < (3, 3)


def candidates(
    kernel: str, head_dim: int, dtype: torch.dtype, rows: int, family: str
) -> tuple[Config, ...]:
    """The configurations of a kernel worth timing, the default first.

    Args:
        kernel: ``"forward"``, ``"documents"``, ``"query"``, ``"keys"`` or ``"mass"``; the first
            three with the suffix ``"-fold"`` or ``"-split"`` if rows are folded or keys split.
        head_dim: ``D``.
        dtype: of the query.
        rows: how many could share a tile: none is made taller than that.
        family: of the device, see :func:`dream_kernels.triton.tiles.family_of`.
    """
    shapes = tiles.listed(kernel, family, head_dim, dtype.itemsize)
    if device.interpreted():
        shapes = (tiles.INTERPRETER,)
    limit = max(16, 1 << (rows - 1).bit_length())
    fitting: dict[Config, None] = {}
    for config in shapes:
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
    on: torch.device,
) -> Config:
    """Return the fastest of ``configs``, timed once per ``key`` and kind of device.

    Timing waits for the device, so it happens at the first call of a kind only, and never while a
    CUDA graph is captured, which takes the default. A configuration that does not fit the device
    is skipped.

    Raises:
        RuntimeError: if no configuration fits the device.
    """
    if len(configs) == 1 or on.type != "cuda" or not tuning_enabled():
        return configs[0]
    key = (device.name(on), *key)
    if key in _fastest:
        return _fastest[key]
    if device.capturing():
        return configs[0]
    from triton.runtime.errors import OutOfResources

    times: dict[Config, float] = {}
    failure: Exception | None = None
    for config in configs:
        try:
            times[config] = device.milliseconds(partial(launch, config))
        except OutOfResources as error:  # noqa: PERF203
            failure = error
    if not times:
        raise RuntimeError(f"no configuration of the kernel fits {on}") from failure
    _fastest[key] = min(times, key=times.__getitem__)
    return _fastest[key]
