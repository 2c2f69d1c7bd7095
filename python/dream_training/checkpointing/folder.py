"""Checkpoint folders: written whole or not at all, and verified when they are read.

A checkpoint holds safetensors and JSON files, and a manifest with the digest of each. It is written
under a temporary name, synced to disk and renamed; a file that was damaged later is named and the
checkpoint refused. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels.files import recover, whole_folder
from dream_training.json_file import read_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
_FORMAT = "dream-kernels checkpoint 1"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is damaged, altered, or of another kind; the message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests were verified.

    Attributes:
        path: its folder.
        step: number of completed steps.
    """

    path: Path
    step: int

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``NAME.safetensors``, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")

    def document(self, name: str) -> Any:
        """The content of ``NAME.json``."""
        return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
) -> Checkpoint:
    """Write ``folder/step-00000012``; one of the same step is replaced.

    Args:
        folder: of all checkpoints of a run; created if it does not exist.
        step: number of completed steps.
        tensors: by file name, tensors by their name.
        documents: by file name, what is written as JSON.

    Raises:
        OSError: the disk is full, or the folder cannot be written; no partial checkpoint remains,
            and earlier ones are kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / f"step-{step:08d}"
    with whole_folder(path) as unfinished:
        for name, content in documents.items():
            text = json.dumps(content)
            (unfinished / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for name, group in tensors.items():
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            try:
                save_file(whole, unfinished / f"{name}.safetensors")
            except SafetensorError as error:  # what the file system said, in the writer's words
                raise OSError(f"{path / name}.safetensors: {error}") from error
        files = {file.name: _describe(file) for file in sorted(unfinished.iterdir())}
        manifest: dict[str, Any] = {"format": _FORMAT, "step": step, "files": files}
        manifest["digest"] = _digest_of(manifest)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Checkpoint(path, step)


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint.

    Raises:
        CheckpointError: a file is missing, unexpected, or not what the manifest says; the
            message names it.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: must be a {_FORMAT!r}")
    digest = manifest.pop("digest", None)
    if digest != _digest_of(manifest) or f"step-{manifest['step']:08d}" != path.name:
        raise CheckpointError(f"{path / MANIFEST}: it was altered")
    there = {file.name for file in path.iterdir()} - {MANIFEST}
    for name in sorted(there ^ manifest["files"].keys()):
        raise CheckpointError(
            f"{path / name}: {'it does not belong there' if name in there else 'it is missing'}"
        )
    for name, expected in manifest["files"].items():
        found = _describe(path / name)
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(
                f"{path / name}: it must have {expected['bytes']} bytes, got {found['bytes']}"
            )
        if found != expected:
            raise CheckpointError(f"{path / name}: its digest is wrong, so it was altered")
    return Checkpoint(path, manifest["step"])


def newest_checkpoint(folder: Path, refuse: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None.

    Args:
        folder: of all checkpoints of a run.
        refuse: called with what is wrong with each that is skipped.
    """
    for path in reversed(list(_paths(folder))):
        try:
            return read_checkpoint(path)
        except (CheckpointError, OSError) as error:  # noqa: PERF203 - there are a few at most
            refuse(str(error))
    return None


def has_checkpoints(folder: Path) -> bool:
    """Whether there is any checkpoint, intact or not."""
    return any(True for _ in _paths(folder))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and files that an interrupted writer left."""
    for path in list(_paths(folder))[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    recover(folder)


def _paths(folder: Path) -> Iterator[Path]:
    """Checkpoint folders, the oldest first."""
    if not folder.is_dir():
        return
    yield from sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.blake2b()
    return {"bytes": add_file(digest, file), "blake2b": digest.hexdigest()}


def add_file(digest: Any, file: Path) -> int:
    """Add the content of a file to a digest; return its length in bytes."""
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
        return content.tell()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
