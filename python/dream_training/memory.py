"""How much memory a device has, and how much of it this process uses."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch


def total_memory(device: torch.device) -> int:
    """Total memory in bytes; 0 if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def used_memory(device: torch.device) -> int:
    """Memory in use now, in bytes; on a CPU 0 if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: since the peak was reset, or on a CPU, since the start.

    0 if the system does not tell: ``resource`` exists on Unix only.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0

    # in KiB, but on macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
