"""Figures of full test runs, one JSON line each."""

from __future__ import annotations

import json
import os
from typing import Any


def record(what: str, **figures: Any) -> None:
    """Append to the file that ``DREAM_SOAK_RECORD`` names, if it names one."""
    path = os.environ.get("DREAM_SOAK_RECORD")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "figures": figures}) + "\n")
