"""The module of options, which everything imports."""

from __future__ import annotations

import subprocess
import sys


def test_it_loads_neither_torch_nor_another_module_of_the_project() -> None:
    code = "import sys, dream_training.choices; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    own = {name for name in loaded if name.startswith(("dream_", "torch", "transformers"))}
    assert own == {"dream_training", "dream_training.choices"}
