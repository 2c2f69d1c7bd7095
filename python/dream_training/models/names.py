"""Names of models that lead nowhere, and tokenizers that do not fit: found early, said plainly."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

PACKAGED_MODEL, PACKAGED_RETRIEVER = "smollm2", "minilm"
PACKAGED = (PACKAGED_MODEL, PACKAGED_RETRIEVER)


def check_name(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a name that is no folder and that the hub cannot have.

    The hub is asked for minutes where there is no network, and its answer is of no use for a
    misspelt path.

    Args:
        path: folder or name.
        what: the argument or config key that it is the value of, such as ``reader``.

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
        raise FileNotFoundError(f"{what}: there is no folder {name!r}{_nearest(name)}") from None
    # No model of the hub without an owner has such a name.
    if "/" not in name and difflib.get_close_matches(name, PACKAGED, cutoff=0.75):
        raise FileNotFoundError(
            f"{what}: there is neither a folder nor a known model {name!r}{_nearest(name)}"
        )


def not_found(path: str | os.PathLike[str], what: str, error: OSError) -> FileNotFoundError:
    """What to raise where the hub gave no model of a name that is no folder either."""
    name = os.fspath(path)
    return FileNotFoundError(
        f"{what}: there is no folder {name!r} here, and it could not be fetched from the hub: "
        f"{first_line(error)}{_nearest(name)}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def _nearest(name: str) -> str:
    """The known model or the folder beside it whose name is nearest, as the end of a message."""
    from dream_training.models.architectures import KNOWN

    parent = Path(name).parent
    beside = []
    if parent.is_dir():
        beside = [str(parent / child.name) for child in parent.iterdir() if child.is_dir()]
    wanted = os.path.normpath(name)
    near = difflib.get_close_matches(wanted, [*PACKAGED, *KNOWN, *beside], n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_vocabulary(tokenizer: Any, model: Any, what: str) -> None:
    """Refuse a tokenizer that makes tokens which the model's embedding has no row for.

    Special tokens that neither begin, end nor pad a text are let pass: multimodal models have some
    that their language model lacks.

    Args:
        tokenizer: of transformers; of others nothing is said.
        model: a transformers model.
        what: what they are, such as ``reader``.

    Raises:
        ValueError: there are such tokens; the message names one.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    added = tokenizer.added_tokens_decoder
    if rows is None or max(len(tokenizer), *added, 0) < rows:
        return
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in _USED}
    beyond = {
        number: token
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (number in used or number not in added or not added[number].special)
    }
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"{what} {model.config._name_or_path}: its tokenizer has {len(beyond)} tokens beyond "
            f"the {rows} rows of its embedding, such as {beyond[first]!r} ({first}): take the "
            f"model's own tokenizer, or save it after resize_token_embeddings({max(beyond) + 1})"
        )


_USED = ("bos", "eos", "pad", "cls", "sep", "unk")
