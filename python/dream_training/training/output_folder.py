"""The output folder of a run: used by one run at a time, without files of an earlier one."""

from __future__ import annotations

import errno
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dream_kernels.files import is_stream
from dream_training.checkpointing.documents import FOLDER as DOCUMENTS
from dream_training.checkpointing.folder import has_checkpoints, newest_checkpoint
from dream_training.evaluation.results import FILE_NAME as EVALUATION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEST, LAST, CHECKPOINTS, FAULTS = "best", "last", "checkpoints", "faults"
HISTORY, CONFIG, CURVE = "history.json", "config.json", "curve.png"
HEADS, HEAD_MAP = "heads.yaml", "heads.png"
EXAMPLES, ENVIRONMENT = "examples.json", "environment.json"
RESULT = "result.json"  # of dream compare

_MODELS = (BEST, LAST)
# A new run deletes these only with --overwrite; the others can be made again in a minute.
_RESULTS = (*_MODELS, CHECKPOINTS, HISTORY, EVALUATION, EXAMPLES, RESULT)
_FILES = (HISTORY, CONFIG, CURVE, HEADS, HEAD_MAP, EVALUATION, EXAMPLES, ENVIRONMENT, RESULT)
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)
# Claimed by this process: the system's locks do not tell its threads apart.
_claimed: set[str] = set()


def check_unused(folder: Path, resume: bool, checkpoint: bool = True) -> None:
    """Raise if a run would destroy the results of an earlier one.

    Args:
        folder: ``output_dir``.
        resume: the run continues from the newest checkpoint. Where there is none it starts at the
            first step, which loses nothing unless a run has ended here.
        checkpoint: whether one of the checkpoints may be intact.

    Raises:
        FileExistsError: there are results of a run, and no checkpoint to resume from.
    """
    checkpoints, there = folder / CHECKPOINTS, results_in(folder)
    if not there:
        return
    if resume and not (folder / HISTORY).exists():
        return
    if resume and checkpoint and has_checkpoints(checkpoints):
        return
    newest = newest_checkpoint(checkpoints, lambda reason: None)
    ways = "use --overwrite to delete them, or another output_dir"
    if newest is not None:
        ways = f"use --resume to continue after step {newest.step}, {ways.removeprefix('use ')}"
    elif resume:
        ways = f"there is no checkpoint to resume from: {ways}"
    raise FileExistsError(
        f"output_dir {folder} has results of an earlier run ({', '.join(there)}): {ways}"
    )


def results_in(folder: Path) -> list[str]:
    """Name the results in a folder: models, checkpoints, history, evaluations."""
    names = []
    for name in _RESULTS:
        path = folder / name
        if path.is_dir():
            names += [f"{name}/"] if any(path.iterdir()) else []
        elif path.exists():
            names.append(name)
    return names


def check_inputs(output_dir: Path, **inputs: str | None) -> None:
    """Raise if a run would replace what it reads, or has no folder to write to.

    Args:
        output_dir: of the run.
        inputs: the models and data sets that it reads, by config key; None for none.

    Raises:
        ValueError: an input is in one of the folders that the run writes, or ``output_dir`` is
            standard output, a device or a pipe.
    """
    if is_stream(output_dir):
        raise ValueError(f"output_dir must be a folder, got {output_dir}")
    folder = output_dir.resolve()
    written = [folder / name for name in (*_MODELS, CHECKPOINTS, FAULTS)]
    for key, value in inputs.items():
        if value is None or not os.path.exists(value):
            continue
        path = Path(value).resolve()
        if any(path == own or own in path.parents for own in written):
            raise ValueError(
                f"{key} {value} is what a run in output_dir {output_dir} replaces: choose "
                "another output_dir"
            )


def remove_run(folder: Path) -> None:
    """Delete what a run wrote to a folder, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _MODELS:
        # If it is a link to a folder elsewhere, the link stays.
        shutil.rmtree(os.path.realpath(folder / name), ignore_errors=True)
    for pattern in ("step-*", f"{DOCUMENTS}/*.safetensors", f"{DOCUMENTS}/*.tmp"):
        for path in (folder / CHECKPOINTS).glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in (folder / FAULTS).glob("step-*.jsonl"):
        path.unlink(missing_ok=True)
    for name in (f"{CHECKPOINTS}/{DOCUMENTS}", CHECKPOINTS, FAULTS):
        with suppress(OSError):  # it does not exist, or holds other files
            (folder / name).rmdir()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block, or the process, ends.

    Raises:
        BlockingIOError: another run is in the folder; the message names its process.
    """
    key = os.path.realpath(folder)
    if key in _claimed:
        raise _in_use(folder, _who())
    if fcntl is None:
        _warn(folder)
        yield
        return
    path = folder / _LOCK
    handle = _lock(folder, path)
    _claimed.add(key)
    try:
        yield
    finally:
        _claimed.discard(key)
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _lock(folder: Path, path: Path) -> int:
    """Open and lock a file; the lock ends with the process, even if the file is deleted."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock: a worker process would inherit its lock and outlive the run with it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _warn(folder)
                return handle
            who = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(folder, who) from None
            raise
        # The previous run deletes the file while it holds the lock: this may be the deleted one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.write(handle, f"{_who()}\n".encode())
                return handle
        os.close(handle)


def _who() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _in_use(folder: Path, who: str) -> BlockingIOError:
    return BlockingIOError(
        f"output_dir {folder} is in use by {who or 'another process'}: wait until it ends, or "
        "choose another output_dir"
    )


def _warn(folder: Path) -> None:
    logger.warning("%s: no file locks here, so a second run in it will not be noticed", folder)
