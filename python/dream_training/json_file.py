"""JSON files, written as a whole and read with errors that name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dream_kernels.files import write_text
from dream_kernels.parsing import parse_json, read_text

# The scores of every query of many tasks.
_MAX_BYTES = 256 << 20


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON; an existing file is replaced as a whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    content = parse_json(read_text(path, _MAX_BYTES), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object, got {type(content).__name__}")
    return content
