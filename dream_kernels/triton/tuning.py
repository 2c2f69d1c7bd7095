"""Which tile shapes suit a call, and which of them was measured to be the fastest."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from dream_kernels.files import write_text
from dream_kernels.triton import device, tiles
from dream_kernels.triton.tiles import Config

# The compiler of triton 3.2 crashes on 64 rows on Hopper that two groups of four warps share.
_ONE_GROUP = device.triton_version() < (3, 3)


def candidates(
    kernel: str, head_dim: int, dtype: torch.dtype, rows: int, family: str
) -> tuple[Config, ...]:
    """The configurations of a kernel, the default first.

    Args:
        kernel: ``"forward"``, ``"documents"``, ``"query"``, ``"both"``, ``"keys"`` or ``"mass"``;
            the first three with the suffix ``"-fold"`` or ``"-split"`` if rows are folded or keys
            split.
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


def tuning_file() -> Path | None:
    """The file of measured choices, ``DREAM_KERNELS_TUNE``; None if shapes are not to be timed.

    Raises:
        ValueError: the variable is neither a ``.json`` file nor ``0``.
    """
    name = os.environ.get("DREAM_KERNELS_TUNE", "0")
    if name in ("", "0"):
        return None
    if not name.endswith(".json"):
        raise ValueError(f"DREAM_KERNELS_TUNE must be a .json file, or 0 for none, got {name!r}")
    return Path(name)


_fastest: dict[str, Config] = {}


def choose(
    key: tuple[Hashable, ...],
    configs: tuple[Config, ...],
    launch: Callable[[Config], object],
    on: torch.device,
) -> Config:
    """Return the first of ``configs``, or the fastest where :func:`tuning_file` names a file.

    Results depend on the shapes in their last bits, so by default they are those of the table. In
    the file they are the same for all processes: the first that needs a choice times it, once per
    ``key`` and model of device, and those beside it wait. While a CUDA graph is captured nothing is
    timed. A configuration that does not fit the device is skipped.

    Raises:
        RuntimeError: if no configuration fits the device.
        ValueError: the file is not one of choices.
    """
    if len(configs) == 1 or on.type != "cuda":
        return configs[0]
    path = tuning_file()
    if path is None:
        return configs[0]
    name = ", ".join(map(str, (device.name(on), *key)))
    if name not in _fastest:
        if device.capturing():
            return _kept(path).get(name, configs[0])
        with _locked(path):
            kept = _kept(path)
            if name not in kept:
                kept[name] = _time(configs, launch, on)
                write_text(path, json.dumps({k: asdict(v) for k, v in kept.items()}, indent=1))
            _fastest[name] = kept[name]
    return _fastest[name]


def _time(
    configs: tuple[Config, ...], launch: Callable[[Config], object], on: torch.device
) -> Config:
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
    return min(times, key=times.__getitem__)


def _kept(path: Path) -> dict[str, Config]:
    """The choices in a file, none if it does not exist."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        return {str(name): Config(**shape) for name, shape in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} (DREAM_KERNELS_TUNE) holds no tile shapes: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from timing at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # until the file is closed
        yield
