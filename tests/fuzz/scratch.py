"""A folder for the files that targets write, in memory if there is such a disk."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")

folder = Path(tempfile.mkdtemp(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None))


@atexit.register
def remove() -> None:
    """Remove the folder; needs no call if Python exits normally."""
    shutil.rmtree(folder, ignore_errors=True)


def write(name: str, data: bytes) -> Path:
    """Write a file into the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
