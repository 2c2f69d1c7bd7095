"""What teaching costs: a pair of query and document, and a training step with and without a reader.

Pairs: ``dream teach`` reads each document once, and takes one forward and one backward for a query
and all its documents; RePlug takes one reading of query and target for every pair; a cross-encoder
one forward for every pair, of query and document together. Steps: the same pool and retriever, with
the reader's verdict computed or given.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dream_training.models.architectures import byte_tokenizer
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.objectives.taught import TaughtCollator, TaughtDreamLoss
from dream_training.reading.likelihood import target_likelihood
from dream_training.reading.reader import Reader
from dream_training.reading.verdict import judge

from .environment import provenance
from .measure import Turn, quantiles, take_turns
from .records import SCHEMA
from .step_models import QUERY_TOKENS, STEP_MODELS, TARGET_TOKENS, load_step_reader, make_rows

Record = dict[str, Any]

PAIR, STEP = "a pair of query and document", "a training step"
TAUGHT, LIVE = "taught", "live reader"
# Of all-MiniLM-L6-v2 and the cross-encoders of its size; random weights take the same time.
MINILM = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 30522,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "vocab_size": 512,
}  # fmt: skip
# Of query and document together in a cross-encoder's input.
_SPECIAL_TOKENS = 3
# Both steps have one loss, up to what a reader in 16 bits rounds otherwise from call to call.
_ALLOWED_LOSS = 1e-3
_LEARNING_RATE = 0.0  # as in the step suite: every run computes the same step


@dataclass
class TeachingSettings:
    """How the costs are measured.

    Attributes:
        model: a key of ``STEP_MODELS``, the reader.
        device: where.
        batch: queries.
        pair_documents: candidates of a query, where pairs are timed.
        step_documents: of the pool, where steps are timed; a multiple of ``batch``.
        document_tokens: of each document.
        runs: timed rounds.
        seconds: budget of one peer.
        quick: whether the figures are from a quick run.
    """

    model: str = "smollm2-135m"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 16
    pair_documents: int = 16
    step_documents: int = 32
    document_tokens: int = 64
    runs: int = 4
    seconds: float = 60.0
    quick: bool = False

    @property
    def small(self) -> Mapping[str, int]:
        """The shape of retriever and cross-encoder."""
        return TINY if self.model == "tiny" else MINILM


@dataclass
class _Peer(Turn):
    """Something that is timed.

    Attributes:
        name: in tables and records.
        what: :data:`PAIR` or :data:`STEP`.
        note: what it does.
        documents: candidates of a query.
        run: does it once.
    """

    name: str
    what: str
    note: str
    documents: int
    run: Callable[[], Any]


def run_teaching(settings: TeachingSettings, say: Callable[[str], None]) -> list[Record]:
    """Time all peers, alternating.

    Args:
        settings: how.
        say: called with progress messages.

    Returns:
        One record for each peer; ``ratio`` is its time over that of :data:`TAUGHT`.
    """
    reader = load_step_reader(
        STEP_MODELS[settings.model], settings.document_tokens, settings.device, "independent"
    )
    peers = [*_pairs(reader, settings), *_steps(reader, settings)]
    turns = {f"{peer.what}, {peer.name}": peer for peer in peers}
    take_turns(turns, partial(_time, settings.device), settings.runs, settings.seconds, say)
    return _records(settings, reader, peers)


def _time(device: torch.device, peer: _Peer, first: bool) -> float:
    """The seconds of one run."""
    start = time.perf_counter()
    peer.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _pairs(reader: Reader, settings: TeachingSettings) -> list[_Peer]:
    """Peers that judge every document of one pool for every query of a batch."""
    rows = make_rows(max(settings.batch, settings.pair_documents))
    documents = [row["documents"][0] for row in rows[: settings.pair_documents]]
    queries = [row["query"] for row in rows[: settings.batch]]
    targets = [row["target"] for row in rows[: settings.batch]]
    encoder = make_cross_encoder(settings.small, settings.device, reader.model.dtype)
    inputs = cross_encoder_inputs(settings)

    @torch.no_grad()
    def encode() -> list[Tensor]:
        # Of few pairs at once, whose activations fit into a cache.
        return [
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            for ids in inputs.split(settings.pair_documents)
        ]

    count = settings.pair_documents
    return [
        _Peer(
            TAUGHT, PAIR, "dream teach: one forward and one backward for a query", count,
            lambda: judge(reader, reader.read(documents), queries, targets),
        ),
        _Peer(
            "RePlug", PAIR, "the target predicted after each document alone", count,
            lambda: target_likelihood(reader, documents, queries, targets),
        ),
        _Peer(
            "cross-encoder", PAIR, "MiniLM-L6's architecture, random weights", count, encode
        ),
    ]  # fmt: skip


def _steps(reader: Reader, settings: TeachingSettings) -> list[_Peer]:
    """Peers that take one step of a retriever over one pool of a batch."""
    each, count = settings.step_documents // settings.batch, settings.step_documents
    texts = make_rows(count)
    rows = []
    for b, row in enumerate(texts[: settings.batch]):
        others = texts[settings.batch + b * (each - 1) :][: each - 1]
        rows.append({**row, "documents": [own["documents"][0] for own in (row, *others)]})
    model = make_small_retriever(settings.small, settings.document_tokens, settings.device)
    live = DistilledDreamLoss(model, reader)
    (query, pool) = features_of(DreamCollator(model)(rows), settings.device)
    logits = live.read(query, pool).tolist()
    given = [
        {**row, "documents": pool["texts"], "logits": own, "positive": -1}
        for row, own in zip(rows, logits, strict=True)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)

    def step(loss: nn.Module, collator: DreamCollator, batch: list[dict[str, Any]]) -> float:
        value = loss(features_of(collator(batch), settings.device))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    taught = TaughtDreamLoss(model)
    peers = [
        _Peer(
            TAUGHT, STEP, "the verdicts are given", count,
            lambda: step(taught, TaughtCollator(model), given),
        ),
        _Peer(
            LIVE, STEP, "the reader reads the pool and every target", count,
            lambda: step(live, DreamCollator(model), rows),
        ),
    ]  # fmt: skip
    losses = [peer.run() for peer in peers]
    if abs(losses[0] - losses[1]) > _ALLOWED_LOSS * abs(losses[1]):
        complaint = f"loss {losses[0]:.6f}, with a live reader {losses[1]:.6f}"
        peers[0].failure = ("wrong", complaint)
    return peers


def features_of(batch: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """The features of queries and documents that a collator made."""
    return [
        {
            key.removeprefix(f"{name}_"): value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key.startswith(f"{name}_")
        }
        for name in ("query", "document")
    ]


def make_cross_encoder(
    shape: Mapping[str, int], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A BERT with random weights that scores query and document together."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    options: dict[str, Any] = {**shape, "num_labels": 1}
    model: Any = BertForSequenceClassification(BertConfig(**options))
    return model.to(device=device, dtype=dtype).eval()


def cross_encoder_inputs(settings: TeachingSettings) -> Tensor:
    """Tokens of all pairs, ``[B * C, L]``, each of full length."""
    length = QUERY_TOKENS + settings.document_tokens + _SPECIAL_TOKENS
    count = settings.batch * settings.pair_documents
    generator = torch.Generator().manual_seed(0)
    words = settings.small["vocab_size"]
    return torch.randint(words, (count, length), generator=generator).to(settings.device)


def make_small_retriever(shape: Mapping[str, int], max_len: int, device: torch.device) -> Any:
    """A retriever with random weights: BERT, mean pooling, and a token for every byte."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    # Without dropout, so that both steps compute one loss.
    options: dict[str, Any] = {
        **shape,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model: Any = BertModel(BertConfig(**options))
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        modules = [
            Transformer(str(path), max_seq_length=max_len),
            Pooling(shape["hidden_size"], pooling_mode="mean"),
        ]
    return SentenceTransformer(modules=modules, device=str(device)).train()


def _records(settings: TeachingSettings, reader: Reader, peers: Sequence[_Peer]) -> list[Record]:
    environment = provenance(settings.device)
    medians = {
        (peer.what, peer.name): quantiles(peer.runs)["median"] for peer in peers if peer.runs
    }
    found = []
    for peer in peers:
        own, base = medians.get((peer.what, peer.name)), medians.get((peer.what, TAUGHT))
        pairs = settings.batch * peer.documents
        found.append(
            {
                "schema": SCHEMA,
                "suite": "teaching",
                "quick": settings.quick,
                "environment": environment,
                "peer": f"{peer.what}: {peer.name}",
                "status": "ok" if peer.failure is None else peer.failure[0],
                "reason": None if peer.failure is None else peer.failure[1],
                "model": settings.model,
                "dtype": str(reader.model.dtype).removeprefix("torch."),
                "batch": settings.batch,
                "documents": peer.documents,
                "document_tokens": settings.document_tokens,
                "query_tokens": QUERY_TOKENS,
                "target_tokens": TARGET_TOKENS,
                "note": peer.note,
                "total": quantiles(peer.runs) if peer.runs else None,
                "seconds_per_pair": own / pairs if own is not None else None,
                "ratio": own / base if own is not None and base is not None else None,
            }
        )
    return found
