"""What the reader said of a query and its pool, kept so that nothing is read twice.

What :class:`~dream_training.objectives.distilled_dream.DistilledDreamLoss` learns from does not
depend on the retriever: a pool that comes again in a later epoch, or in the training of another
retriever, has the same teacher.
"""

from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_training.reading.document_store import model_identity, tensor_bytes

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader


class Verdicts:
    """A map from reader, query, target and pool to what each document is worth, in memory.

    It grows by four bytes for each document of a pool, and nothing leaves it.

    Args:
        shared: whether several readers may use it. Then the reader's weights are part of a key;
            their digest takes about a second for each gigabyte.

    Attributes:
        hits: queries whose verdict was known.
        misses: queries that were read.
    """

    def __init__(self, shared: bool = True) -> None:
        self.shared = shared
        self.hits = self.misses = 0
        self._known: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    def unknown(self, keys: Sequence[str]) -> list[int]:
        """The places of the queries whose verdict is not known."""
        return [i for i, key in enumerate(keys) if key not in self._known]

    def count(self, hits: int, misses: int) -> None:
        """Count queries."""
        self.hits += hits
        self.misses += misses

    def get(self, keys: Sequence[str]) -> Tensor:
        """Return ``[B, C]`` in nats on the CPU, 0 after the end of a smaller pool."""
        rows = [self._known[key] for key in keys]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def put(self, keys: Sequence[str], worth: Tensor, sizes: Sequence[int]) -> None:
        """Keep ``worth``, ``[B, C]``, of pools of ``sizes`` documents."""
        for key, row, size in zip(keys, worth.detach().cpu(), sizes, strict=True):
            self._known[key] = row[:size].clone()

    def state(self) -> dict[str, Any]:
        """Return what is kept, in a form that JSON can hold.

        A verdict that is read again is the same only up to rounding, which depends on the batch
        that it is read in.
        """
        values = [value for row in self._known.values() for value in row.tolist()]
        dtypes = {row.dtype for row in self._known.values()} or {torch.float32}
        assert len(dtypes) == 1  # one reader has said all of it, unless it is shared
        kind = "f" if dtypes == {torch.float32} else "d"
        return {
            "keys": list(self._known),
            "sizes": list(map(len, self._known.values())),
            "kind": kind,
            "values": base64.b64encode(array(kind, values).tobytes()).decode(),
            "hits": self.hits,
            "misses": self.misses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.hits, self.misses = state["hits"], state["misses"]
        values = array(state["kind"])
        values.frombytes(base64.b64decode(state["values"]))
        dtype = torch.float32 if state["kind"] == "f" else torch.float64
        rows = torch.tensor(values, dtype=dtype).split(state["sizes"])
        self._known = {key: row.clone() for key, row in zip(state["keys"], rows, strict=True)}


def verdict_keys(
    identity: str, queries: Sequence[str], targets: Sequence[str], pools: Sequence[Sequence[str]]
) -> list[str]:
    """Return the key of each query with its target and the texts of its pool, in their order."""
    return [
        hashlib.blake2b(json.dumps([identity, *texts]).encode(), digest_size=20).hexdigest()
        for texts in zip(queries, targets, pools, strict=True)
    ]


def reader_identity(reader: Reader) -> str:
    """Return a digest of all that decides what a reader says: weights, heads, prompt, lengths.

    Reads every weight once: about a second for each gigabyte.
    """
    injection, tokens = reader.injection, reader.tokens
    head = hashlib.blake2b()
    for part in tensor_bytes(reader.model.get_output_embeddings().weight):
        head.update(part)
    settings: dict[str, Any] = {
        "model": model_identity(reader.model),
        "head": head.hexdigest(),
        "heads": {str(layer): list(heads) for layer, heads in injection.heads.items()},
        "mode": injection.mode,
        "document_mass": injection.document_mass,
        "context": reader.context,
        "injected_rows": reader.injected_rows,
        "lengths": [tokens.query_max_len, tokens.passage_max_len, tokens.target_max_len],
        "prompt": asdict(tokens.prompt),
        # Not part after part, as in versions whose verdicts may have been kept.
        "tokens": "of the whole prompt",
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode()).hexdigest()
