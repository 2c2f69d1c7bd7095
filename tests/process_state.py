"""What a test must leave as it was: the state of the process that the next one runs in."""

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

# torch's own, of which there is one to a process. It raises only while a loader has its processes.
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
_LOGGERS = (None, "transformers", "datasets", "sentence_transformers", "dream_training")
_START_METHOD = multiprocessing.get_all_start_methods()[0]  # the default comes first
# What the package itself registers with transformers, once, and what importing a library sets.
_OWN_ATTENTION = "dream_"
_OF_IMPORTS = {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "PYTEST_CURRENT_TEST"}


def process_state() -> dict[str, Any]:
    """Return the state by name, in well under a millisecond."""
    state: dict[str, Any] = {
        "working directory": os.getcwd(),
        "sys.path": tuple(sys.path),
        "recursion limit": sys.getrecursionlimit(),
        "trace function": sys.gettrace(),
        "torch.get_num_threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 products": (
            torch.get_float32_matmul_precision(),
            getattr(torch.backends.cuda.matmul, "fp32_precision", None),
        ),
        "start method": multiprocessing.get_start_method(allow_none=True) or _START_METHOD,
        "children": {child.pid for child in multiprocessing.active_children()},
        "process group": dist.is_available() and dist.is_initialized(),
    }
    for number in _SIGNALS:
        state[f"handler of {number.name}"] = signal.getsignal(number)
    for number in _LIMITS:
        state[f"resource limit {number}"] = resource.getrlimit(number)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        state[f"level of logger {logger.name}"] = (logger.level, logger.disabled, logger.propagate)
    # The mapping beneath os.environ, which decodes nothing.
    environment = getattr(os.environ, "_data", os.environ)
    for key, value in environment.items():
        name = os.fsdecode(key)
        if name not in _OF_IMPORTS:
            state[f"environment variable {name}"] = value
    # Only once it is imported: most tests of the kernels do without.
    if "transformers.modeling_utils" in sys.modules:
        from transformers import AttentionInterface, AttentionMaskInterface

        for interface in (AttentionInterface, AttentionMaskInterface):
            for name, function in interface._global_mapping.items():
                if not name.startswith(_OWN_ATTENTION):
                    state[f"{interface.__name__} {name}"] = function
    return state


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Fail if the block leaves the state of the process changed.

    Args:
        what: that is checked, for the message.
    """
    before = process_state()
    yield
    after = process_state()
    if before == after:
        return
    changed = [
        f"{name}: {before.get(name)!r} became {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not _first_import(name, before)
    ]
    assert not changed, f"{what} leaves the process changed: " + "; ".join(changed)


def _first_import(name: str, before: dict[str, Any]) -> bool:
    """Whether an attention is among those that transformers brings, imported just now."""
    interface = name.split()[0]
    return "Attention" in interface and not any(key.startswith(interface) for key in before)
