"""The environment of a run: versions, device, threads."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

import dream_kernels

PACKAGES = (
    "torch", "triton", "transformers", "sentence-transformers", "peft", "datasets", "beir", "mteb",
    "bm25s", "numpy", "scipy",
)  # fmt: skip


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """Return versions, device, threads and date, for a JSON file beside the figures."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()} {device.type}"
        name += f" ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else ""
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "dream-kernels": dream_kernels.__version__,
            **installed_versions(PACKAGES),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
