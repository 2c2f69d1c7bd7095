"""What a test must not change: the state of the process that the next one runs in."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data._utils import signal_handling

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

# torch's own, one per process. It raises only while a loader has its processes.
signal_handling._set_SIGCHLD_handler()

_SIGNALS = tuple(
    getattr(signal, f"SIG{name}")
    for name in ("INT", "TERM", "CHLD", "ALRM", "HUP", "USR1", "USR2", "XFSZ", "PIPE", "ABRT")
    if hasattr(signal, f"SIG{name}")
)
_LIMITS = tuple(
    getattr(resource, f"RLIMIT_{name}")
    for name in ("AS", "DATA", "STACK", "FSIZE", "NOFILE", "CPU", "CORE")
    if hasattr(resource, f"RLIMIT_{name}")
)
# Once they are imported; the root logger always.
_LOGGERS = ("transformers", "datasets", "sentence_transformers", "dream_training")
_START_METHOD = multiprocessing.get_all_start_methods()[0]  # the default comes first
# What the package itself registers with transformers, once, and what importing a library sets;
# setuptools appends its _vendor to sys.path.
_OWN_ATTENTION = "dream_"
_OF_IMPORTS = (
    "ACCELERATE_",  # a trainer of transformers 4, to the same values each time
    "KMP_",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
    "_RJEM_",  # polars, which mteb imports
    "TRITON_CACHE_DIR",
    "PYTEST_CURRENT_TEST",
)


def process_state() -> dict[str, Any]:
    """Return the state by name, in well under a millisecond; of libraries once they are there."""
    state: dict[str, Any] = {
        "working directory": os.getcwd(),
        "sys.path": [path for path in sys.path if not path.endswith("_vendor")],
        "environment": _environment(),
        # Inductor raises it to 2,000 when it first compiles something that its cache does not have.
        "recursion limit": max(sys.getrecursionlimit(), 2000),
        "trace and profile functions": (sys.gettrace(), sys.getprofile()),
        "torch.get_num_threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 products": (
            torch.get_float32_matmul_precision(),
            getattr(torch.backends.cuda.matmul, "fp32_precision", None),
        ),
        "start method": multiprocessing.get_start_method(allow_none=True) or _START_METHOD,
        "children": {child.pid: child.name for child in multiprocessing.active_children()},
        "process group": dist.is_available() and dist.is_initialized(),
        "signal handlers": {number.name: signal.getsignal(number) for number in _SIGNALS},
        "resource limits": {number: resource.getrlimit(number) for number in _LIMITS},
        "root logger": _level(logging.getLogger()),
    }
    for name in _LOGGERS:
        if name in sys.modules:
            state[f"logger of {name}"] = _level(logging.getLogger(name))
    if "transformers.modeling_utils" in sys.modules:
        from transformers import AttentionInterface, AttentionMaskInterface

        for interface in (AttentionInterface, AttentionMaskInterface):
            state[interface.__name__] = {
                name: function
                for name, function in interface._global_mapping.items()
                if not name.startswith(_OWN_ATTENTION)
            }
    return state


def _environment() -> dict[str, Any]:
    # The mapping beneath os.environ, which decodes nothing.
    found = getattr(os.environ, "_data", os.environ)
    return {
        name: value
        for name, value in ((os.fsdecode(key), value) for key, value in found.items())
        if not name.startswith(_OF_IMPORTS)
    }


def _level(logger: logging.Logger) -> tuple:
    return logger.level, logger.disabled, logger.propagate


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Fail if the block leaves the state of the process changed.

    Args:
        what: that is checked, for the message.
    """
    before = process_state()
    yield
    after = process_state()
    changed = [_difference(name, before[name], after[name]) for name in before]
    told = "; ".join(filter(None, changed))
    assert not told, f"{what} leaves the process changed: {told}"


def _difference(name: str, before: Any, after: Any) -> str:
    if before == after:
        return ""
    if not isinstance(before, dict):
        return f"{name}: {before!r} became {after!r}"
    return ", ".join(
        f"{name}: {key} was {before.get(key, 'absent')!r} and is {after.get(key, 'absent')!r}"
        for key in before | after
        if before.get(key, "absent") != after.get(key, "absent")
    )
