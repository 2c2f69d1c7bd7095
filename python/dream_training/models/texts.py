"""How a query or a document becomes what the retriever sees: its prompt, its length, its route.

Training, evaluation, mining and the doctor all use this module, so that each encodes a text alike,
and as ``encode_query`` and ``encode_document`` of the saved model do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from dream_kernels.parsing import shortened
from dream_training.json_file import read_json, write_json
from dream_training.models.text_tokens import cut_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dream_training.config_groups import LengthsConfig, RetrieverConfig

QUERY, DOCUMENT = "query", "document"
KINDS = (QUERY, DOCUMENT)
# Beside a model saved by sentence-transformers 5, which has one length for both kinds.
LENGTHS_FILE = "text_lengths.json"
COSINE: Literal["cosine"] = "cosine"


def text_features(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: str,
    max_len: int | None = None,
    prompt: str | None = None,
) -> dict[str, Any]:
    """Return the features of texts, as ``encode_query`` and ``encode_document`` make them.

    Args:
        model: the retriever.
        texts: ``N`` texts.
        task: ``"query"`` or ``"document"``.
        max_len: tokens of a text, prompt and special tokens included; the model's own by default.
        prompt: put before every text; the model's own by default, ``""`` for none.

    Returns:
        What the model's forward takes: ``input_ids`` and ``attention_mask`` ``[N, L]``, ...
    """
    prompt = prompt_of(model, task) if prompt is None else prompt
    options = _call_options(model, task, max_len)
    return dict(model.preprocess(_cut(model, texts, task, max_len), prompt, task=task, **options))


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: str,
    max_len: int | None = None,
    **options: Any,
) -> Any:
    """Embed texts by ``encode_query`` or ``encode_document``; ``options`` are theirs.

    Args:
        model: the retriever.
        texts: ``N`` texts.
        task: ``"query"`` or ``"document"``.
        max_len: tokens of a text; the model's own by default.
    """
    own = model.encode_query if task == QUERY else model.encode_document
    cut = _cut(model, texts, task, max_len)
    return own(cut, **{**_call_options(model, task, max_len), **options})


def prompt_of(model: SentenceTransformer, task: str) -> str:
    """The prompt that ``encode_query`` or ``encode_document`` puts before a text, ``""`` for none.

    The library itself chooses it, by its own order of names and with the default prompt.
    """
    # Its method, called on a stand-in for the model, returns the prompt it asks for.
    asked = SimpleNamespace(prompts=model.prompts, encode=lambda **options: options)
    options = getattr(type(model), f"encode_{task}")(asked, inputs=[])
    if options["prompt"] is not None:
        return str(options["prompt"])
    return model.prompts.get(options["prompt_name"] or model.default_prompt_name or "") or ""


def length_of(model: SentenceTransformer, task: str) -> int | None:
    """The model's own limit for a query or a document, in tokens; None if there is none."""
    module = _input_module(model, task)
    lengths = (
        getattr(module, "processing_kwargs", {}).get("text", {}).get("max_length"),
        getattr(module, f"{task}_length", None),
        getattr(module, "max_seq_length", None),
    )
    own = next((length for length in lengths if length is not None), None)
    return own if isinstance(own, int) else None


def set_lengths(model: SentenceTransformer, query: int, document: int) -> None:
    """Make the model encode queries and documents up to these numbers of tokens."""
    longest = max(query, document)
    model.max_seq_length = longest
    for task, length in ((QUERY, query), (DOCUMENT, document)):
        module: Any = _input_module(model, task)
        # A length among the options of every call would override what is set here.
        getattr(module, "processing_kwargs", {}).get("text", {}).pop("max_length", None)
        setattr(module, f"{task}_length", length if length < longest else None)


def prepare_retriever(
    model: SentenceTransformer, retriever: RetrieverConfig, lengths: LengthsConfig
) -> SentenceTransformer:
    """Set a config's lengths and prompts in the model, for every use of it and for its folder.

    Raises:
        ValueError: the model truncates its embeddings.
    """
    if model.truncate_dim is not None:
        raise ValueError(
            f"the retriever has truncate_dim {model.truncate_dim}, which training does not use "
            "and saving does not keep: set it to None, and truncate when you encode"
        )
    if model.similarity_fn_name != COSINE:
        warnings.warn(
            f"the retriever's similarity is {model.similarity_fn_name!r}; it is trained with "
            f"{COSINE!r}, and saved with it",
            stacklevel=2,
        )
        model.similarity_fn_name = COSINE
    set_lengths(model, lengths.query_max_len, lengths.passage_max_len)
    for task, prompt in ((QUERY, retriever.query_prompt), (DOCUMENT, retriever.document_prompt)):
        if prompt is not None:
            model.prompts[task] = prompt
    return model


def text_settings(
    model: SentenceTransformer, query_max_len: int | None = None, passage_max_len: int | None = None
) -> dict[str, Any]:
    """The settings of texts that an evaluation's figures depend on, as JSON values."""
    return {
        "query_max_len": query_max_len or length_of(model, QUERY),
        "passage_max_len": passage_max_len or length_of(model, DOCUMENT),
        "prompts": {task: prompt_of(model, task) for task in KINDS},
        "similarity": model.similarity_fn_name,
    }


@contextmanager
def fixed_lengths(
    model: SentenceTransformer, query_max_len: int | None, passage_max_len: int | None
) -> Iterator[None]:
    """Inside, ``encode_query`` and ``encode_document`` use these lengths for every caller."""
    own = vars(model)
    for task, max_len in ((QUERY, query_max_len), (DOCUMENT, passage_max_len)):
        name = f"encode_{task}"
        own[name] = partial(getattr(model, name), **_call_options(model, task, max_len))
    try:
        yield
    finally:
        for task in KINDS:
            del own[f"encode_{task}"]


def library_keeps_lengths() -> bool:
    """Whether sentence-transformers keeps lengths of queries and documents apart (from 6.0)."""
    from sentence_transformers.models import Transformer

    return "query_length" in Transformer.config_keys


def write_lengths(model: SentenceTransformer, folder: Path) -> None:
    """Write the model's lengths beside it if they differ and the library keeps only one."""
    lengths = {task: length_of(model, task) for task in KINDS}
    if lengths[QUERY] != lengths[DOCUMENT] and not library_keeps_lengths():
        write_json(folder / LENGTHS_FILE, lengths)


def read_lengths(model: SentenceTransformer, folder: Path) -> None:
    """Set the lengths that :func:`write_lengths` left in the model's folder, if it did.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / LENGTHS_FILE
    if not path.is_file():
        return
    lengths = read_json(path)
    for task in KINDS:
        length = lengths.get(task)
        if type(length) is not int or length < 1:
            raise ValueError(f"{path}: {task} must be a number of tokens, got {shortened(length)}")
    set_lengths(model, lengths[QUERY], lengths[DOCUMENT])


def _input_module(model: SentenceTransformer, task: str) -> Any:
    """The module that tokenises texts of a kind: the first one, or that of a router's route."""
    first: Any = model[0]
    routes = getattr(first, "sub_modules", {})
    return routes[task][0] if task in routes else first


def _call_options(model: SentenceTransformer, task: str, max_len: int | None) -> dict[str, Any]:
    """What a call of the library needs to use a length other than that of all texts."""
    if max_len is None:
        if getattr(_input_module(model, task), f"{task}_length", None) is None:
            return {}
        max_len = length_of(model, task)
    return {"processing_kwargs": {"text": {"max_length": max_len}}}


def _cut(
    model: SentenceTransformer, texts: Sequence[str], task: str, max_len: int | None
) -> list[str]:
    limit = length_of(model, task) if max_len is None else max_len
    return [cut_text(text, limit) for text in texts]
