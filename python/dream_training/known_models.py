"""Models known by name, and early, plain errors for wrong names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

PACKAGED_MODEL, PACKAGED_RETRIEVER = "smollm2", "minilm"
PACKAGED = (PACKAGED_MODEL, PACKAGED_RETRIEVER)

# From their public configuration files, so that a plan needs no network and no accepted licence.
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN_05B = {
    **_QWEN,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_LLAMA_1B = {
    **_LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_LLAMA_3B = {
    **_LLAMA,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_LLAMA_70B = {
    **_LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
KNOWN = {
    "Qwen/Qwen2.5-0.5B": _QWEN_05B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_05B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
}


def check_name(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a name that is neither a folder nor a valid name of the hub.

    Without a network, asking the hub takes minutes, and its answer does not help with a misspelt
    path.

    Args:
        path: folder or name.
        what: the argument or config key that has this value, such as ``reader``.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = os.fspath(path)
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        raise NotADirectoryError(f"{what} must be a folder or a name of the hub, got file {name!r}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{what}: there is no folder {name!r}{nearest(name)}") from None
    # No hub model without an owner has such a name.
    if "/" not in name and difflib.get_close_matches(name, PACKAGED, cutoff=0.75):
        raise FileNotFoundError(
            f"{what}: there is neither a folder nor a known model {name!r}{nearest(name)}"
        )


def not_found(path: str | os.PathLike[str], what: str, error: OSError) -> FileNotFoundError:
    """The error for a name that is not a folder and that the hub gave no model for."""
    name = os.fspath(path)
    return FileNotFoundError(
        f"{what}: there is no folder {name!r} here, and it could not be fetched from the hub: "
        f"{first_line(error)}{nearest(name)}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def nearest(name: str) -> str:
    """The closest name of a known model or of what is beside it, as the end of a message."""
    parent = Path(name).parent
    beside = []
    if parent.is_dir():
        beside = [
            str(parent / child.name)
            for child in parent.iterdir()
            if child.is_dir() or child.suffix == ".gguf"
        ]
    wanted = os.path.normpath(name)
    near = difflib.get_close_matches(wanted, [*PACKAGED, *KNOWN, *beside], n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""
