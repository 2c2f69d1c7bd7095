"""Generation with documents: what belongs to it accompanies every step that transformers takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dream_kernels.injection.call import cache_of
from dream_kernels.injection.context import Prefix

# Ways of generating that call the model on other rows than those of the prompts, or another model,
# and arguments that count tokens otherwise.
_UNSUPPORTED = (
    "assistant_model",
    "custom_generate",
    "dola_layers",
    "guidance_scale",
    "inputs_embeds",
    "negative_prompt_ids",
    "past_key_values",
    "cache",
    "penalty_alpha",
    "position_ids",
    "prompt_lookup_num_tokens",
)


@dataclass(frozen=True)
class _Generation:
    model: nn.Module
    batch: int
    documents: dict[str, Any]
    # The documents, each prompt's repeated for its beams or samples, by their number.
    repeated: dict[int, dict[str, Any]] = field(default_factory=dict)

    def of_copies(self, copies: int) -> dict[str, Any]:
        if copies not in self.repeated:
            rows = torch.arange(self.batch).repeat_interleave(copies)
            self.repeated[copies] = {
                name: self._of_rows(value, rows) if copies > 1 else value
                for name, value in self.documents.items()
            }
        return dict(self.repeated[copies])

    def _of_rows(self, value: Any, rows: Tensor) -> Any:
        if isinstance(value, Prefix):
            return value.of_rows(rows)
        if isinstance(value, Tensor) and len(value) == self.batch:
            return value[rows.to(value.device)]
        return value


_current: ContextVar[_Generation | None] = ContextVar("dream_generation", default=None)


def check_options(model: Any, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for options of ``generate`` that documents do not go with."""
    config = options.get("generation_config") or model.generation_config

    def given(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    for name in _UNSUPPORTED:
        if given(name) is not None and (name, given(name)) != ("guidance_scale", 1):
            raise ValueError(f"{name} is not supported in generation with documents")
    cache = given("cache_implementation")
    if cache is not None and not cache.startswith("dynamic"):
        # Others make transformers hand over a mask in four dimensions.
        raise ValueError(
            f"cache_implementation must be 'dynamic' in generation with documents, got {cache!r}"
        )


@contextmanager
def generating(model: nn.Module, batch: int, documents: dict[str, Any]) -> Iterator[None]:
    """Give every call of ``model`` in here, in this thread, the documents of ``batch`` prompts."""
    token = _current.set(_Generation(model, batch, documents))
    try:
        yield
    finally:
        _current.reset(token)


def documents_of_step(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Return the documents of a step of :func:`generating`, empty outside of it.

    Args:
        model: that is called.
        given: its arguments by name. With a prefix their position ids are taken out: transformers
            counts from the first token that it sees.
    """
    # torch.compile cannot read a context variable, and no graph spans a generation.
    generation = None if torch.compiler.is_compiling() else _current.get()
    if generation is None or generation.model is not model:
        return {}
    # Beams and samples of one prompt are consecutive rows, and stay among themselves.
    rows, tokens = given["input_ids"].shape
    documents = generation.of_copies(rows // generation.batch)
    if "document_prefix" in documents:
        given.pop("position_ids", None)
    if "document_first_row" in documents:  # counted from the start of the prompt
        _, begun = cache_of(given)
        documents["document_first_row"] = min(
            max(documents["document_first_row"] - begun, 0), tokens
        )
    return documents
