"""Untrusted models: code that comes with one is not run unless allowed, and no pickle is read.

Weights come as safetensors. The libraries that load models ask for permission in most places; this
module covers the rest, with errors that name this project's own options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dream_kernels.parsing import parse_json, read_text, shortened
from dream_training.console import progress
from dream_training.known_models import check_name, first_line, not_found

_HOW_TO_ALLOW = (
    "it is not run unless you allow it: --trust-remote-code, or trust_remote_code: true in a "
    "config, or trust_remote_code=True in Python. Read it first: it can do here what you can"
)
_PICKLED = "is a pickle, which is never read; save it again with: model.save_pretrained(folder)"
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin")
_LIBRARY_CLASS = re.compile(r"sentence_transformers(\.[A-Za-z_]\w*)+")


def check_model_folder(path: str | os.PathLike[str], trust_remote_code: bool = False) -> None:
    """Refuse a folder whose weights are pickled, or that comes with code that is not allowed.

    Names of the hub pass: their files are not here yet, and the libraries check them.

    Raises:
        ValueError: for either; the message names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    parts = [folder, *(child for child in folder.iterdir() if child.is_dir())]
    for part in parts:
        pickled = [file for pattern in _PICKLED_WEIGHTS for file in part.glob(pattern)]
        if pickled and not any(part.glob("*.safetensors")):
            raise ValueError(f"{pickled[0]} {_PICKLED}")
    if trust_remote_code:
        return
    modules = folder / "modules.json"
    if modules.is_file():
        # Before 6.0, sentence-transformers ran the code of any local folder.
        listed = parse_json(read_text(modules), str(modules))
        for module in listed if isinstance(listed, list) else [listed]:
            name = module.get("type") if isinstance(module, dict) else module
            if not isinstance(name, str) or not _LIBRARY_CLASS.fullmatch(name):
                raise ValueError(
                    f"{modules} names {shortened(name)}, which is code from outside of "
                    f"sentence-transformers; {_HOW_TO_ALLOW}"
                )
    for part in parts:
        config = part / "config.json"
        if config.is_file():
            content = parse_json(read_text(config), str(config))
            for key in ("attn_implementation", "_attn_implementation"):
                name = content.get(key) if isinstance(content, dict) else None
                if isinstance(name, str) and "/" in name:
                    raise ValueError(
                        f"{config} asks for the attention kernel {shortened(name)} of the hub; "
                        f"{_HOW_TO_ALLOW}"
                    )


@contextmanager
def guarded(
    path: str | os.PathLike[str], trust_remote_code: bool = False, what: str = "model"
) -> Iterator[None]:
    """Load a model inside: its folder is checked, and errors of the libraries are made plain.

    Args:
        path: folder or hub name.
        trust_remote_code: run code that comes with the model.
        what: the argument or config key that names the model.

    Raises:
        FileNotFoundError: there is no such model.
        ModuleNotFoundError: the model needs a package that is missing, such as a quantiser.
        ValueError: the model comes with code that is not allowed, or pickled weights.
    """
    check_name(path, what)
    check_model_folder(path, trust_remote_code)
    try:
        with progress(f"loading {Path(path).name}"):
            yield
    except ValueError as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(f"{path} brings code of its own; {_HOW_TO_ALLOW}") from error
        raise
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(
                f"{path} has no weights in safetensors; any other file of weights {_PICKLED}"
            ) from error
        if not Path(path).is_dir():
            raise not_found(path, what, error) from error
        raise OSError(f"{what} {path}: {first_line(error)}") from error
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{what} {path} needs a package that is missing: {first_line(error)}"
        ) from error


def weight_options(trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` for permission and safetensors."""
    return {"trust_remote_code": trust_remote_code, "use_safetensors": True}


def load_tokenizer(
    path: str | os.PathLike[str], trust_remote_code: bool = False, what: str = "model"
) -> Any:
    """Load the tokenizer of a model.

    Raises:
        OSError: there is no such model.
        ValueError: the tokenizer comes with code that is not allowed.
    """
    from transformers import AutoTokenizer

    with guarded(path, trust_remote_code, what):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_language_model(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    what: str = "model",
    **options: Any,
) -> Any:
    """Load a decoder with its head; ``options`` are those of ``from_pretrained``.

    Raises:
        OSError: there is no such model.
        ValueError: the model comes with code that is not allowed, or pickled weights.
    """
    from transformers import AutoModelForCausalLM

    with guarded(path, trust_remote_code, what):
        return AutoModelForCausalLM.from_pretrained(
            path, **weight_options(trust_remote_code), **options
        )


def load_model_config(
    path: str | os.PathLike[str], trust_remote_code: bool = False, what: str = "model"
) -> Any:
    """Load the configuration of a model.

    Raises:
        OSError: there is no such model.
        ValueError: the configuration needs code that is not allowed.
    """
    from transformers import AutoConfig

    with guarded(path, trust_remote_code, what):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
