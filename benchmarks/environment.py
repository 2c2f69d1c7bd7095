"""Provenance of a figure: machine, versions and commit."""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import dream_kernels
from dream_training.environment import installed_versions

_RESULTS = "benchmarks/results"  # recording a figure changes no code
PACKAGES = (
    "torch", "triton", "transformers", "sentence-transformers", "peft", "xformers", "flash-attn",
)  # fmt: skip


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit, date and threads."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"dream-kernels": dream_kernels.__version__, **installed_versions(PACKAGES)},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU with its widest vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def device_slug(device: str) -> str:
    """The name of a device as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str | None:
    """The commit of the checkout that contains this package, ``+`` if files differ from it."""
    folder = Path(__file__).resolve().parent
    if not shutil.which("git") or not (folder.parent / "setup.py").is_file():
        return None

    def git(*arguments: str) -> str | None:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top){_RESULTS}"
    )
    return head + ("+" if changed else "")


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return None
    result = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 else None
