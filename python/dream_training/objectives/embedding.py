"""Embeddings of more texts than fit into memory with the activations of one backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dream_training.choices import check_at_least
from dream_training.distributed import world
from dream_training.distributed.sharding import is_sharded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# What a collator adds for objective and reader; the retriever does not take it.
_NOT_OF_THE_MODEL = ("texts", "targets", "positives", "pools", "share", "logits")


def embed(
    model: SentenceTransformer,
    features: Mapping[str, Any],
    mini_batch_size: int | None = None,
) -> Tensor:
    """Embed a batch of texts, holding the activations of at most one mini-batch.

    Gradient caching (Gao et al. 2021, arXiv 2101.06983): each mini-batch is embedded without
    keeping activations, and is embedded once more when the gradient in its embeddings arrives.
    The state of the random generators is kept, so that dropout draws the same masks again. But
    masks are drawn for a mini-batch as a whole: with dropout, mini-batches of another size have
    other masks, equal in distribution. Without it the size changes nothing but rounding. The
    objective on top sees ordinary tensors and needs to know nothing of it. A sharded retriever
    embeds as many mini-batches in every process, for each fetches weights from all of them.

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
    check_at_least("mini_batch_size", mini_batch_size, 1)
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "mini_batch_size needs features with an attention_mask of [N, L], got "
            f"{', '.join(inputs)}: packed inputs cannot be cut"
        )
    parts = []
    begins = list(range(0, len(mask), mini_batch_size))
    most = world.max_over_ranks(len(begins)) if is_sharded(model) else len(begins)
    for index in range(most):
        begin = begins[min(index, len(begins) - 1)]
        part = _cut(inputs, slice(begin, begin + mini_batch_size), mask.shape)
        embedding = _Embedding(model)
        if torch.is_grad_enabled():
            embedded = checkpoint(embedding, part, use_reentrant=False)
        else:
            embedded = embedding(part)
        parts.append(embedded if index < len(begins) else embedded[:0])
    return torch.cat(parts)


@torch.no_grad()
def draws_random_numbers(model: SentenceTransformer) -> bool:
    """Whether a retriever in training draws random numbers, for dropout or the like."""
    device = model.device
    before = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        states = [_generator_states(device)]
        try:
            features = model.preprocess(["a text"])
            model.train()
            model({k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()})
        finally:
            model.train(before)
        states.append(_generator_states(device))
    return not all(map(torch.equal, *states))


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


class _Embedding:
    """Embeds one mini-batch, perhaps again when its gradient arrives.

    DDP and DeepSpeed prepare for a backward in the forward of their wrapper, and must not do so
    in the middle of one; so the second time the model itself is called.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self._model: Any = model

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        model, self._model = self._model, getattr(self._model, "module", self._model)
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
