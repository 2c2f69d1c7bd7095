"""Where full runs record their figures: JSON lines in the file that DREAM_SOAK_RECORD names."""

from __future__ import annotations

import json
import os
from typing import Any

SOAK = os.environ.get("DREAM_SOAK") == "1"


def record(what: str, **figures: Any) -> None:
    """Append the figures, if a file is named."""
    if path := os.environ.get("DREAM_SOAK_RECORD"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "figures": figures}) + "\n")
