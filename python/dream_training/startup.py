"""What the ``dream`` command sets before it imports anything: environment, warnings, a cache."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import typer

# Variables that libraries read when they are imported.
QUIET_LIBRARIES = {
    "TOKENIZERS_PARALLELISM": "false",
    # Loading fewer layers than a checkpoint has would report every layer left out.
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def quieten_libraries() -> None:
    """Keep libraries' progress bars and notes out of the command's output; warnings stay."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def find_datasets_cache() -> None:
    """Give ``datasets`` a temporary cache if its own is not writable, and say so.

    The library creates its cache folder even for data that it streams.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    cache = Path(os.environ.get("HF_HOME") or home).expanduser() / "datasets"
    if os.environ.get("HF_DATASETS_CACHE"):
        return
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), cache)
    if there.is_dir() and os.access(there, os.W_OK):
        return
    temporary = tempfile.mkdtemp(prefix="dream-datasets-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    os.environ["HF_DATASETS_CACHE"] = temporary
    typer.echo(
        f"dream: the cache {cache} cannot be written: data sets from the hub are downloaded again "
        "in every run; set HF_DATASETS_CACHE to a writable folder",
        err=True,
    )
