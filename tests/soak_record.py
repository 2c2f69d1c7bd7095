"""Figures of long test runs, one JSON line each, in the file that DREAM_SOAK_RECORD names."""

from __future__ import annotations

import json
import os


def record(what: str, **figures: object) -> None:
    """Append the figures of one test; does nothing where no file is named."""
    path = os.environ.get("DREAM_SOAK_RECORD")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "figures": figures}) + "\n")
