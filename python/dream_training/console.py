"""What commands print: one kind of console, and the progress of long operations."""

from __future__ import annotations

import functools
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

WIDTH = 80
# Seconds to the first line of progress and between the next ones, without a terminal.
FIRST_LINE, EVERY_LINE = 5.0, 20.0
# Characters of a bar and of its label: figures and time need the rest of 80 columns.
_BAR, _SHOWN = 16, 28

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class OutputConsole(Console):
    """Breaks text only between words, so that a path or a command can be copied."""

    def print(self, *objects: Any, **options: Any) -> None:
        if "soft_wrap" not in options and all(isinstance(part, str) for part in objects):
            objects = (wrapped(" ".join(objects), self.width),)
            options["soft_wrap"] = True
        super().print(*objects, **options)


def make_console(beside: str | os.PathLike[str] | None = None) -> Console:
    """Make the console of a command, on standard error if ``beside`` names standard output.

    Text is printed as it is: brackets are no markup, and figures are not coloured. Without a
    terminal its width is COLUMNS, 80 by default.
    """
    console = OutputConsole(
        markup=False, highlight=False, emoji=False, stderr=beside is not None and _is_stdout(beside)
    )
    columns = os.environ.get("COLUMNS", "")
    if not console.is_terminal:
        console.width = int(columns) if columns.isdigit() and int(columns) > 0 else WIDTH
    return console


def _is_stdout(path: str | os.PathLike[str]) -> bool:
    # Imported here, so that `dream --help` need not wait for torch.
    from dream_kernels.files import is_standard_output

    return is_standard_output(path)


def wrapped(text: str, width: int) -> str:
    """Wrap the lines of a text between words, keeping each one's indentation; words stay whole."""
    lines = []
    for line in text.split("\n"):
        words = line.lstrip()
        indent = line[: len(line) - len(words)]
        lines += textwrap.wrap(
            words,
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def print_entry(console: Console, head: str, text: str, style: str = "") -> None:
    """Print a head and a text beside it, the lines of the text aligned."""
    beside = wrapped(" " * len(head) + text, console.width)[len(head) :]
    console.print(Text.assemble((head, style), beside), soft_wrap=True)


def print_paths(console: Console, paths: Mapping[str, str | os.PathLike[str]]) -> None:
    """Print the paths of files, each unbroken on its own line."""
    width = max((len(name) for name, path in paths.items() if path), default=0)
    for name, path in paths.items():
        console.print(f"{name:<{width}}  {os.fspath(path)}".rstrip(), soft_wrap=True)


def make_table(*columns: str, texts: int = 1) -> Table:
    """Make a table of figures that is as narrow as possible.

    Args:
        columns: their headers.
        texts: how many of them, from the first on, hold text, which is cut if there is no room;
            figures never are.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for i, name in enumerate(columns):
        if i < texts:  # not no_wrap: rich then cuts the other columns too
            table.add_column(name, overflow="ellipsis")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest ends that tell paths apart; a name that is no folder or file is kept."""
    paths = {name: Path(name).resolve().parts for name in names if Path(name).exists()}
    shown = {}
    for name in names:
        shown[name] = name
        for count in range(1, len(paths.get(name, ())) + 1):
            end = paths[name][-count:]
            if not any(o[-count:] == end for n, o in paths.items() if o != paths[name]):
                shown[name] = "/".join(end)
                break
    return shown


# Where progress is shown; nowhere unless a command or a run sets it.
_console: ContextVar[Console | None] = ContextVar("console", default=None)
# The work in progress on a console, the innermost last, and the bars of a terminal.
_doing: WeakKeyDictionary[Console, list[Work]] = WeakKeyDictionary()
_bars: WeakKeyDictionary[Console, Bars] = WeakKeyDictionary()


def show_on(console: Console) -> Console:
    """Show progress on this console, until the function that :func:`shows_progress` marks ends."""
    _console.set(console)
    return console


def shows_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that calls :func:`show_on`: the setting ends with the call."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        return copy_context().run(function, *args, **kwargs)

    return inner


class Work:
    """A long operation.

    Args:
        what: what is done, such as ``"encoding documents"``.
        total: the number of items; None if it is not known.

    Attributes:
        done: how many of them are done.
        detail: further text to show.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        self.done, self.detail = 0, ""
        self._begin = time.monotonic()
        self._changed: Callable[[], None] = lambda: None

    def advance(self, count: int = 1) -> None:
        self.update(self.done + count)

    def update(self, done: int, detail: str = "") -> None:
        self.done, self.detail = done, detail
        self._changed()

    @property
    def count(self) -> str:
        if self.total is not None:
            return f"{self.done:,}/{self.total:,}"
        return f"{self.done:,}" if self.done else ""

    def line(self) -> str:
        """The progress so far, and the time left."""
        seconds = time.monotonic() - self._begin
        parts = [
            f"{self.what} ... {self.count}".rstrip(),
            self.detail,
            f"{duration(seconds)} so far",
        ]
        if self.total and 0 < self.done < self.total:
            left = seconds * (self.total - self.done) / self.done
            parts.append(f"about {duration(left)} left")
        return ", ".join(filter(None, parts))


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Work]:
    """Show progress: a bar on a terminal, otherwise a line now and then.

    It appears on the console of :func:`show_on`; without one, or on a quiet one, nothing is shown.

    Args:
        what: what is done.
        total: the number of items; None if it is not known.
    """
    work, console = Work(what, total), _console.get()
    if console is None or console.quiet:
        yield work
        return
    doing = _doing.setdefault(console, [])
    doing.append(work)
    try:
        with _bar(console, work) if console.is_interactive else _lines(console, work):
            yield work
    finally:
        doing.remove(work)


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Show progress while slow imports run inside; with several processes, in the first."""
    first = os.environ.get("RANK", "0") == "0"
    token = _console.set(make_console() if first else None)
    try:
        with progress("loading the libraries"):
            yield
    finally:
        _console.reset(token)


def tracked(things: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, and show how many are done."""
    with progress(what, total) as work:
        for thing in things:
            yield thing
            work.advance()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def shortened(text: str, length: int = _SHOWN) -> str:
    """Cut a text to at most ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


class _Time(ProgressColumn):
    """The time left, or the time passed if that is not known."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._left, self._passed = TimeRemainingColumn(), TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        return (self._passed if task.total is None else self._left).render(task)


@contextmanager
def _bar(console: Console, work: Work) -> Iterator[None]:
    bars = _bars.get(console)
    if bars is None:  # a terminal has one live display
        bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR),
            TextColumn("{task.fields[count]}", markup=False),
            _Time(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            speed_estimate_period=600.0,
        )
        with bars:
            _bars[console] = bars
            try:
                with _bar(console, work):
                    yield
            finally:
                del _bars[console]
        return
    task = bars.add_task(shortened(work.what), total=work.total, count=work.count, detail="")

    def show() -> None:
        bars.update(
            task, completed=work.done, total=work.total, count=work.count, detail=work.detail
        )

    work._changed = show
    try:
        yield
    finally:
        bars.remove_task(task)


@contextmanager
def _lines(console: Console, work: Work) -> Iterator[None]:
    ended = threading.Event()

    def speak() -> None:
        wait = FIRST_LINE
        while not ended.wait(wait):
            wait = EVERY_LINE
            if _doing[console][-1:] == [work]:
                console.print(work.line())

    thread = threading.Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
