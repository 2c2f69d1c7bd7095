"""Keys and values of documents that the reader has read alone, kept over steps, epochs and runs.

A document read alone gives the same keys and values whatever the query, the pool or the step. So
they are kept under a digest of all that decides them: the reader's configuration and weights, the
type of its numbers, the header's tokens and the document's own. How many tokens of memory or disk
that takes is bounded, and the least recently used documents are deleted first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dream_kernels.files import open_whole
from dream_training.choices import MEMORY, check_positive
from dream_training.console import tracked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "dream-kernels document 1"
_SUFFIX = ".safetensors"
# Temporary files of a writer that crashed are deleted after an hour.
_STALE_SECONDS = 3600.0
# Where a model came from and how it computes; neither decides what it computes. The type of its
# numbers is taken from the weights.
_NOT_OF_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "_attn_implementation",
    "dtype",
    "torch_dtype",
)

logger = logging.getLogger(__name__)


class DocumentStore(ABC):
    """A bounded map from header and document, as tokens, to keys and values.

    Args:
        identity: names the model that reads, its weights included; see :func:`model_identity`.
        max_bytes: what is kept at most.

    Attributes:
        hits: documents that were found.
        misses: documents that were not.

    Raises:
        ValueError: ``max_bytes`` is not positive.
    """

    def __init__(self, identity: str, max_bytes: int) -> None:
        check_positive("max_bytes", max_bytes)
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._identity = identity
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the most recently used one is last
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def bytes(self) -> int:
        """What is kept now."""
        return self._bytes

    def get(self, header: Sequence[int], document: Sequence[int]) -> Tensor | None:
        """Return ``[layers, 2, Hkv, L, D]`` on the CPU, or None.

        Args:
            header: tokens before the document.
            document: its ``L`` tokens; none for the header's own keys and values.
        """
        name = self._name(header, document)
        states = self._load(name, len(document) or len(header))
        if states is not None:
            self._touch(name)
        if document:
            self.hits += states is not None
            self.misses += states is None
        return states

    def put(self, header: Sequence[int], document: Sequence[int], states: Tensor) -> None:
        """Keep keys and values; what would not fit even alone is not kept.

        Args:
            header: tokens before the document.
            document: its ``L`` tokens, or none.
            states: ``[layers, 2, Hkv, L, D]``, not a view of anything larger.
        """
        name = self._name(header, document)
        if states.nbytes > self.max_bytes:
            return
        self._forget(name)
        self._sizes[name] = size = self._save(name, states)
        self._bytes += size
        while self._bytes > self.max_bytes:
            oldest = next(iter(self._sizes))
            self._forget(oldest)
            self._delete(oldest)

    def _name(self, header: Sequence[int], document: Sequence[int]) -> str:
        key = json.dumps([self._identity, list(header), list(document)])
        return hashlib.blake2b(key.encode(), digest_size=20).hexdigest()

    def _forget(self, name: str) -> None:
        self._bytes -= self._sizes.pop(name, 0)

    def _touch(self, name: str) -> None:
        self._sizes.move_to_end(name)

    @abstractmethod
    def _load(self, name: str, tokens: int | None) -> Tensor | None:
        """Return what is kept under a name, or None; ``tokens`` is how many it must have."""

    @abstractmethod
    def _save(self, name: str, states: Tensor) -> int:
        """Keep ``states`` under a name and return what that takes, in bytes."""

    @abstractmethod
    def _delete(self, name: str) -> None:
        """Delete what is kept under a name."""


class MemoryStore(DocumentStore):
    """Keeps documents in main memory, for one run."""

    def __init__(self, identity: str, max_bytes: int) -> None:
        super().__init__(identity, max_bytes)
        self._states: dict[str, Tensor] = {}

    def write_to(self, folder: Path) -> list[str]:
        """Write to a folder what is not there yet; return all names, the one used last at the end.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        disk = DiskStore(folder, self._identity, self.max_bytes)
        for name, states in self._states.items():
            if name not in disk:
                disk._save(name, states)
        return list(self._sizes)

    def read_from(self, folder: Path, names: Sequence[str]) -> None:
        """Keep what :meth:`write_to` wrote; what is damaged or missing is left out, and named."""
        disk = DiskStore(folder, self._identity, self.max_bytes)
        for name in names:
            states = disk._load(name, None)
            if states is None:
                logger.warning("%s: not there any more, read again", disk._path(name))
                continue
            self._sizes[name] = size = self._save(name, states)
            self._bytes += size

    def _load(self, name: str, tokens: int | None) -> Tensor | None:
        return self._states.get(name)

    def _save(self, name: str, states: Tensor) -> int:
        self._states[name] = states.cpu()
        return states.nbytes

    def _delete(self, name: str) -> None:
        del self._states[name]


class DiskStore(DocumentStore):
    """Keeps documents in a folder, one safetensors file each, for this run and later ones.

    Several runs and several readers may share a folder; each run keeps to its own bound. A file
    that is damaged, or is not what its name says, is refused with a warning and deleted, and the
    document is read again.

    Args:
        folder: is made where it does not exist.
        identity: as in :class:`DocumentStore`.
        max_bytes: as in :class:`DocumentStore`; files that are there count.

    Raises:
        ValueError: ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str, max_bytes: int) -> None:
        super().__init__(identity, max_bytes)
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"document_store must be a folder, got the file {folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another run deleted it
                continue
            if path.suffix == _SUFFIX:
                found.append((status.st_mtime_ns, path.stem, status.st_size))
            elif path.suffix == ".tmp" and status.st_mtime < time.time() - _STALE_SECONDS:
                path.unlink(missing_ok=True)
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self._bytes += size

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def keep_only(self, names: set[str]) -> None:
        """Delete all others."""
        for name in set(self._sizes) - names:
            self._forget(name)
            self._delete(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _load(self, name: str, tokens: int | None) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                states = file.get_tensor("states")
        except FileNotFoundError:
            self._forget(name)
            return None
        except (SafetensorError, OSError) as error:
            self._refuse(name, str(error))
            return None
        reason = None
        if metadata.get("format") != _FORMAT or metadata.get("name") != name:
            reason = "it was not written for this document and reader"
        elif states.dim() != 5 or tokens not in (None, states.shape[3]):
            reason = f"it holds {list(states.shape)} for {tokens} tokens"
        elif metadata.get("crc32") != _crc32(states):
            reason = "its check sum is wrong"
        if reason is not None:
            self._refuse(name, reason)
            return None
        # Another run may have written it.
        if name not in self._sizes:
            self._sizes[name] = size = path.stat().st_size
            self._bytes += size
        return states

    def _refuse(self, name: str, reason: str) -> None:
        logger.warning("%s: refused and read again: %s", self._path(name), reason)
        self._forget(name)
        self._delete(name)

    def _touch(self, name: str) -> None:
        super()._touch(name)
        try:
            os.utime(self._path(name))
        except FileNotFoundError:  # another run deleted it after it was read
            self._forget(name)

    def _save(self, name: str, states: Tensor) -> int:
        from safetensors.torch import save

        states = states.cpu().contiguous()
        metadata = {"format": _FORMAT, "name": name, "crc32": _crc32(states)}
        content = save({"states": states}, metadata)
        # The disk is not waited for: what a crash of the machine damages is read again.
        with open_whole(self._path(name), binary=True, sync=False) as file:
            file.write(content)
        return len(content)

    def _delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


def open_document_store(
    choice: str | os.PathLike[str] | None, model: PreTrainedModel, max_gb: float
) -> DocumentStore | None:
    """Open the store that a config names.

    Args:
        choice: ``"memory"``, a folder, or None for no store.
        model: the reader's model.
        max_gb: what is kept at most, in 10⁹ bytes.

    Raises:
        ValueError: the folder is a file.
    """
    if choice is None:
        return None
    max_bytes = max(1, int(max_gb * 1e9))
    if choice == MEMORY:
        # No other run sees it, so the model needs no name.
        return MemoryStore("", max_bytes)
    return DiskStore(choice, model_identity(model), max_bytes)


@torch.no_grad()
def model_identity(model: PreTrainedModel) -> str:
    """Return a digest of the decoder's configuration and of all its weights and their types.

    Reads every weight once: about a second for each gigabyte.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith(_NOT_OF_THE_MODEL)
    }
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
    state: dict[str, Any] = model.base_model.state_dict()
    for name in tracked(sorted(state), "digesting the reader's weights", len(state)):
        tensor = state[name]
        if not isinstance(tensor, Tensor):  # settings of quantised layers
            digest.update(f"{name} {tensor}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for part in tensor_bytes(tensor):
            digest.update(part)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, or of those that it is made of: a quantised one's integers, scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield _bytes_of(tensor)
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from tensor_bytes(getattr(tensor, name))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _crc32(states: Tensor) -> str:
    return f"{zlib.crc32(_bytes_of(states)):08x}"
