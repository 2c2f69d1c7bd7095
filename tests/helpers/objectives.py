"""Tiny losses, and their batches."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from dream_training.models.retriever import build_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.reading.reader import Reader
from helpers.tiny import HEADS, make_decoder, make_rows, make_tokenizer


def make_retriever(tiny_model, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return build_retriever(tiny_model, layers=2, lora_r=4, dtype="float32", device="cpu").to(dtype)


def make_reader(heads=None, **options) -> Reader:
    decoder = make_decoder().double()
    return Reader(decoder, make_tokenizer(), heads or {1: [0]}, impl="reference", **options)


def make_distilled_loss(tiny_model, reading: dict | None = None, **options) -> DistilledDreamLoss:
    model = make_retriever(tiny_model)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B starts at zero
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return DistilledDreamLoss(model, make_reader(HEADS, **(reading or {})), 0.1, **options)


def features(model: SentenceTransformer, rows: list[dict], **options: Any) -> list[dict]:
    """What the collator makes of rows: the features of the queries and of the documents."""
    return split(DreamCollator(model, **options)(rows))


def split(batch: dict[str, Any]) -> list[dict]:
    """The features of a batch's queries and of its documents."""
    return [
        {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
        for prefix in ("query_", "document_")
    ]


def with_candidates(count: int = 5) -> list[dict]:
    """Rows with two to four candidates, some shared, the relevant one in the middle."""
    rows = make_rows(count)
    texts = [row["documents"][0] for row in rows]
    for i, row in enumerate(rows):
        others = [texts[(i + j) % count] for j in range(1, 2 + i % 3)]
        row["documents"] = [others[0], texts[i], *others[1:]]
        row["positive"] = 1
    return rows


def repeated_steps(loss: torch.nn.Module) -> list[float]:
    """The losses of twelve steps on one batch."""
    inputs = features(loss.model, make_rows(6))
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(inputs)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values
