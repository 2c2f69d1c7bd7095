"""The processes of ``dataloader_workers``: how a run ends them, and reports one that crashed."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_DEAD = re.compile(r"DataLoader worker \(pid.*")


def leave_signals_to_the_run(loader: DataLoader) -> None:
    """Have a loader's processes ignore the signals by which a terminal or a shell stops a run.

    The run answers them, and still needs batches for the step that it finishes.

    Args:
        loader: as accelerate has prepared it.
    """
    # What it skips when a run is resumed is a new loader, with the same options.
    getattr(loader, "base_dataloader", loader).worker_init_fn = _leave_process_group


def _leave_process_group(number: int) -> None:
    # SIGTERM stays: torch uses it to end a process that does not respond.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


@contextmanager
def workers_end(count: int, collator: Any) -> Iterator[None]:
    """End the processes that make batches when the block ends, however it does.

    torch watches them in its handler of SIGCHLD, which raises wherever the main thread is when
    one of them ends, for as long as their iterator exists. An exception's traceback keeps it.

    Args:
        count: ``dataloader_workers``.
        collator: of the loader, by which its iterators are known.
    """
    try:
        yield
    finally:
        with _no_reports():
            for found in gc.get_objects() if count else ():
                # Without isinstance, which asks lazy modules for their class.
                if type(found) is _MultiProcessingDataLoaderIter and found._collate_fn is collator:
                    found._shutdown_workers()


@contextmanager
def _no_reports() -> Iterator[None]:
    """Keep torch's handler from raising inside."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main and hasattr(signal, "SIGCHLD") else None
    if before is None:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            if callable(before):
                before(number, frame)
        except RuntimeError as error:
            if dead_worker(error) is None:
                raise

    signal.signal(signal.SIGCHLD, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def dead_worker(error: BaseException) -> str | None:
    """Return torch's message about a dead process, from an error or what it was raised from.

    The handler raises amid any code, which may make an error of its own of it.
    """
    seen: BaseException | None = error
    while seen is not None:
        if found := _DEAD.search(str(seen)):
            return found[0].strip()
        seen = seen.__cause__ or seen.__context__
    return None


def error_in_worker(error: Exception) -> Exception | None:
    """Return what a process has raised, without the traceback that torch makes its message of."""
    if not re.match(r"Caught \w+ in DataLoader worker", str(error)):
        return None
    # The last one: what it was raised from comes before it.
    lines = rf"^(?:[\w.]+\.)?{type(error).__name__}: "
    *_, message = re.split(lines, str(error), flags=re.MULTILINE)
    return None if message == str(error) else type(error)(message.strip())
