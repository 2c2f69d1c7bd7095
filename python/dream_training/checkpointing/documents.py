"""Documents of a store in memory, written next to the checkpoints."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from dream_training.reading.document_store import DiskStore, DocumentStore, MemoryStore

FOLDER = "documents"


class StoredDocuments:
    """Saves and restores the state of a document store.

    A document that is read again is the same only up to rounding, which depends on the batch that
    it is read in. So a store in memory is written to ``checkpoints/documents``, every document
    once, and a checkpoint holds their names. A store on disk needs no copy.

    Args:
        store: of the reader.
        checkpoints: the folder of the run's checkpoints.
        keep: how many checkpoints are kept, with the documents that they name.
    """

    def __init__(self, store: DocumentStore, checkpoints: Path, keep: int) -> None:
        self.store, self.folder = store, checkpoints / FOLDER
        self._named: deque[list[str]] = deque(maxlen=keep)

    def state(self) -> dict[str, Any]:
        """Return names and counts; write the documents that no earlier checkpoint wrote.

        Raises:
            OSError: the disk is full.
        """
        state: dict[str, Any] = {"hits": self.store.hits, "misses": self.store.misses}
        if isinstance(self.store, MemoryStore):
            state["names"] = self.store.write_to(self.folder)
            self._named.append(state["names"])
            disk = DiskStore(self.folder, "", self.store.max_bytes)
            disk.keep_only({name for names in self._named for name in names})
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.store.hits, self.store.misses = state["hits"], state["misses"]
        if isinstance(self.store, MemoryStore):
            self.store.read_from(self.folder, state["names"])
            self._named.append(state["names"])
