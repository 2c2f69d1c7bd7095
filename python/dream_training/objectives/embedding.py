"""Embeddings of more texts than the activations of one backward leave room for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# What a collator brings along for objective and reader; the retriever does not take it.
_NOT_OF_THE_MODEL = ("texts", "targets", "positives", "pools")


def embed(
    model: SentenceTransformer,
    features: Mapping[str, Any],
    mini_batch_size: int | None = None,
) -> Tensor:
    """Embed a batch of texts, holding the activations of at most one mini-batch.

    Gradient caching (Gao et al. 2021, arXiv 2101.06983): each mini-batch is embedded without
    keeping activations, and is embedded once more when the gradient in its embeddings arrives.
    The state of the random generators is kept, so that dropout draws the same masks again. The
    objective on top sees ordinary tensors and needs to know nothing of it.

    Args:
        model: the retriever.
        features: its tokens, ``[N, L]`` each; texts and what else a collator adds are left out.
        mini_batch_size: how many texts are embedded at once; None keeps the activations of all of
            them, and embeds once.

    Returns:
        ``[N, D]`` in the model's dtype, with a graph where gradients are on.

    Raises:
        ValueError: ``mini_batch_size`` is below 1, or the features are packed into one row, which
            cannot be cut into mini-batches.
    """
    inputs = {key: value for key, value in features.items() if key not in _NOT_OF_THE_MODEL}
    if mini_batch_size is None:
        return model(inputs)["sentence_embedding"]
    check_mini_batch_size(mini_batch_size)
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "mini_batch_size needs features with an attention_mask of [N, L], got "
            f"{', '.join(inputs)}: packed inputs cannot be cut"
        )
    parts = []
    for begin in range(0, len(mask), mini_batch_size):
        part = _cut(inputs, slice(begin, begin + mini_batch_size), mask.shape)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_embed, model, part, use_reentrant=False))
        else:
            parts.append(_embed(model, part))
    return torch.cat(parts)


def check_mini_batch_size(mini_batch_size: int | None) -> None:
    """Raise ``ValueError`` if it is below 1."""
    if mini_batch_size is not None and mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")


def _embed(model: SentenceTransformer, inputs: dict[str, Any]) -> Tensor:
    # A copy, for the modules of a model add what they compute to the features.
    return model(dict(inputs))["sentence_embedding"]


def _cut(inputs: dict[str, Any], rows: slice, shape: torch.Size) -> dict[str, Any]:
    """Some rows of a batch ``[N, L]``, without the padding that ends all of them."""
    occupied = inputs["attention_mask"][rows].any(0).nonzero()
    length = int(occupied[-1]) + 1 if len(occupied) else 1
    part = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == shape[0]:
            value = value[rows]
            if value.shape[1:2] == shape[1:]:
                value = value[:, :length]
        part[key] = value
    return part
