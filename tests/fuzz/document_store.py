"""Files of the store of keys and values: damaged, swapped, or not ours.

Their checksum detects damage, not malice: atheris, which sees what is compared, does forge it. So
all that is required is that nothing but keys and values for the document's tokens comes back.
"""

from __future__ import annotations

import logging

from fuzz import scratch
from fuzz.driver import instrumented, main

with instrumented("dream_training.reading.document_store"):
    import torch

    from dream_training.reading.document_store import DiskStore

_HEADER, _DOCUMENT = [1, 2], [3, 4, 5]
_STATES = torch.arange(2 * 2 * 1 * 3 * 2, dtype=torch.float32).reshape(2, 2, 1, 3, 2)
_FOLDER = scratch.folder / "store"


def _valid() -> bytes:
    store = DiskStore(_FOLDER, "model", 1 << 20)
    store.put(_HEADER, _DOCUMENT, _STATES)
    (path,) = _FOLDER.glob("*.safetensors")
    return path.read_bytes()


_CONTENT = _valid()
(_PATH,) = _FOLDER.glob("*.safetensors")
SEEDS = [
    _CONTENT,
    _CONTENT[:8] + b" " * (len(_CONTENT) - 8),
    b"\xff" * 8 + _CONTENT[8:],
    (2**63).to_bytes(8, "little") + b"{}",
    b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    b"PK\x03\x04" + _CONTENT,
    b"",
]


def check(data: bytes) -> None:
    """Raise unless a file gives keys and values for three tokens, or nothing and is removed."""
    _PATH.write_bytes(data)
    found = DiskStore(_FOLDER, "model", 1 << 20).get(_HEADER, _DOCUMENT)
    assert not _PATH.exists() if found is None else found.dim() == 5 and found.shape[3] == 3


if __name__ == "__main__":
    # Every damaged file logs a warning, which would take longer than reading one.
    logging.getLogger("dream_training.reading.document_store").setLevel(logging.CRITICAL)
    main(check, SEEDS)
