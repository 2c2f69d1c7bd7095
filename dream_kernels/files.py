"""Atomic writes of files and folders, with the permissions of the umask.

Content is written under a temporary name in the same folder, flushed to disk and renamed. Symbolic
links are followed: the link stays, and its target is replaced. ``-`` is standard output; devices
and pipes are written directly, because a rename would replace them.
"""

from __future__ import annotations

import codecs
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Union

AnyPath = Union[str, "os.PathLike[str]"]

STANDARD_OUTPUT = "-"
_STDOUT, _STDERR = 1, 2
_UNFINISHED = ".dream.tmp"


@contextmanager
def open_whole(path: AnyPath, *, binary: bool = False, sync: bool = True) -> Iterator[IO[Any]]:
    """Open a file for writing; it appears when the block ends without an exception.

    Args:
        path: the file; missing parent folders are created. The target of a symbolic link is
            replaced or created. ``-`` is standard output; a device or pipe is written directly.
        binary: write bytes; otherwise text, as UTF-8 without newline translation.
        sync: wait for the disk, so that a machine crash leaves the old or the new file.

    Raises:
        OSError: the file cannot be written; the message names it. The old one stays.
    """
    with _direct(path) if is_stream(path) else _replacing(path, sync) as stream:
        writer: Any = stream if binary else codecs.getwriter("utf-8")(stream)
        yield writer


def write_text(path: AnyPath, text: str) -> None:
    """Write a text as :func:`open_whole` does."""
    with open_whole(path) as stream:
        stream.write(text)


@contextmanager
def whole_folder(path: AnyPath, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder; it appears as ``path`` when the block ends without an exception.

    Args:
        path: the folder; the target of a symbolic link is replaced or created.
        replace: replace an existing folder; otherwise it stays, and what was written is dropped.

    Raises:
        FileExistsError: ``path`` is a file.
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{path} is a file; expected a folder or nothing")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(target)
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir(parents=True)
        mode = stat.S_IMODE(new.stat().st_mode)
        yield new
        _settle(new, mode)
        if replace and target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists() and not target.exists():
                old.rename(target)
            if replace or not target.is_dir():  # otherwise another process was faster
                raise
        to_disk(target.parent)
    finally:
        if target.exists() or not old.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: AnyPath) -> None:
    """Finish or remove what killed writers left in a folder, while nothing else writes there.

    A folder that was moved away is replaced by the new one, which is complete at that point.
    """
    for temporary in Path(folder).glob(f".*{_UNFINISHED}"):
        target = temporary.with_name(temporary.name[1 : -len(_UNFINISHED) - 9])
        if temporary.is_dir():
            new = temporary / "new"
            if not target.exists() and (temporary / "old").exists() and new.exists():
                new.rename(target)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def is_stream(path: AnyPath) -> bool:
    """Whether a path is standard output (``-``), a device or a pipe.

    It is written once, and no other file is written next to it.
    """
    if _standard_stream(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_standard_output(path: AnyPath) -> bool:
    """Whether a path is ``-`` or another name of standard output, such as ``/dev/stdout``."""
    return _standard_stream(path) == _STDOUT


def to_disk(path: Path) -> None:
    """Flush a file or folder to disk, where the system supports it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _standard_stream(path: AnyPath) -> int | None:
    """1 or 2 if a path is standard output or standard error, else None."""
    if os.fspath(path) == STANDARD_OUTPUT:
        return _STDOUT
    try:
        found = os.stat(path)
    except OSError:
        return None
    for number in (_STDOUT, _STDERR):
        with suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(number)):
                return number
    return None


@contextmanager
def _direct(path: AnyPath) -> Iterator[IO[bytes]]:
    number = _standard_stream(path)
    if number is None:
        with open(path, "wb") as stream:
            yield stream
        return
    # Not opened by name: that would truncate a file it is redirected to, and a second write
    # position would overwrite what the first has written.
    standard = sys.stdout if number == _STDOUT else sys.stderr
    standard.flush()
    yield standard.buffer
    standard.buffer.flush()


@contextmanager
def _replacing(path: AnyPath, sync: bool) -> Iterator[IO[bytes]]:
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file")
    if target.is_symlink():
        raise OSError(f"{path}: its symbolic links lead in a circle")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(target)
    try:
        with _named_after(path, temporary):
            with open(temporary, "xb") as stream:
                yield stream
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
            os.replace(temporary, target)
        if sync:
            to_disk(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def _named_after(path: AnyPath, temporary: Path) -> Iterator[None]:
    """Let an error name the file that the caller passed."""
    try:
        yield
    except OSError as error:
        if str(error.filename) != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")


def _settle(folder: Path, mode: int) -> None:
    """Give the content of a folder the permissions of the umask, and flush it to disk.

    Some writers, such as safetensors, create files that only their owner can read.
    """
    for parent, _, files in os.walk(folder):
        os.chmod(parent, mode)
        for name in files:
            path = Path(parent) / name
            path.chmod(mode & 0o666)
            to_disk(path)
        to_disk(Path(parent))
