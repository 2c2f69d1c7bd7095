"""The console of the commands, and the progress of what takes long."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console

from dream_training import console as consoles
from dream_training.console import (
    OutputConsole,
    duration,
    make_console,
    make_table,
    print_entry,
    progress,
    short_names,
    show_on,
    shows_progress,
    tracked,
    wrapped,
)

PATH = "/a/very/long/path/" + "folder-with-a-name/" * 6 + "file [of brackets].json"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def printed(console: Console, *objects: object, **options: object) -> str:
    with console.capture() as capture:
        console.print(*objects, **options)
    return capture.get()


def test_width_without_a_terminal(monkeypatch, capsys) -> None:
    assert make_console().width == 80
    monkeypatch.setenv("COLUMNS", "120")
    assert make_console().width == 120
    monkeypatch.setenv("COLUMNS", "0")
    assert make_console().width == 80


def test_text_is_printed_as_it_is_and_words_stay_whole(capsys) -> None:
    console = make_console()
    text = f"12 lines :smile: of [bold]{PATH}[/bold] and more"
    output = printed(console, text)
    assert output.split() == text.split() and "\x1b" not in output
    assert all(len(line) <= 80 or " " not in line.strip() for line in output.splitlines())
    assert printed(console, "a" * 90) == "a" * 90 + "\n"


def test_lines_break_to_their_own_indentation() -> None:
    assert wrapped("  one two three\nfour", 9) == "  one two\n  three\nfour"
    console = OutputConsole(width=20, file=io.StringIO())
    with console.capture() as capture:
        print_entry(console, "name    ", "some text that is longer", "bold")
    assert capture.get() == "name    some text\n        that is\n        longer\n"


def test_a_table_cuts_texts_and_no_figure() -> None:
    table = make_table("model", "nDCG@10", "documents")
    table.add_row("m" * 60, "0.1234", "1,234,567")
    console = OutputConsole(width=40, file=io.StringIO())
    output = printed(console, table)
    assert "0.1234" in output and "1,234,567" in output and "mm…" in output
    assert max(map(len, output.splitlines())) <= 40


def test_short_names_tell_folders_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/best", "b/best", "beir"):
        (tmp_path / name).mkdir(parents=True)
    names = ["a/best", str(tmp_path / "b/best"), "./beir", "BM25", "org/model"]
    assert list(short_names(names).values()) == ["a/best", "b/best", "beir", "BM25", "org/model"]


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (300, "5 min"), (7200, "2.0 h")])
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text


@shows_progress
def work_on(console: Console, until: threading.Event | None = None) -> None:
    show_on(console)
    with progress("outer"):
        for number in tracked(range(4), "inner", 4):
            if number == 2 and until is not None:
                assert until.wait(60)


class Said(io.StringIO):
    """Sets an event as soon as a line is printed."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        if "\n" in text:
            self.event.set()
        return count


def test_without_a_terminal_a_wait_prints_lines(monkeypatch) -> None:
    monkeypatch.setattr(consoles, "FIRST_LINE", 0.01)
    monkeypatch.setattr(consoles, "EVERY_LINE", 0.01)
    file = Said()
    work_on(OutputConsole(file=file, width=80), file.event)
    first = file.getvalue().splitlines()[0]
    assert re.fullmatch(
        r"(outer \.\.\.|inner \.\.\. \d/4), \d+ s so far(, about \d+ s left)?", first
    )
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_a_short_wait_a_quiet_console_and_a_library_print_nothing(monkeypatch) -> None:
    monkeypatch.setattr(consoles, "FIRST_LINE", 1e6)
    file = io.StringIO()
    work_on(OutputConsole(file=file, width=80))
    monkeypatch.setattr(consoles, "FIRST_LINE", 0.0)
    work_on(OutputConsole(file=file, width=80, quiet=True))
    assert list(tracked([1, 2], "outside of a command")) == [1, 2]
    assert file.getvalue() == ""


def test_a_terminal_has_bars_that_leave_nothing_behind() -> None:
    file = Terminal()
    console = OutputConsole(file=file, width=80, markup=False, highlight=False)

    @shows_progress
    def work() -> None:
        show_on(console)
        with progress("outer [x]") as outer, progress("inner", 10) as inner:
            outer.update(0, "loss 0.123  12,345 tokens/s")
            inner.advance(3)
            console.print("a line above")
            consoles._bars[console].refresh()

    work()
    output = file.getvalue()
    assert "outer [x]" in output and "3/10" in output and "a line above" in output
    visible = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", output)
    assert max(map(len, visible.splitlines())) <= 80
    assert output.rstrip().endswith("\x1b[2K") or "\x1b[2K" in output[-40:], "the bars are erased"
    assert console not in consoles._bars and not consoles._doing[console]


def test_no_color(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = OutputConsole(file=Terminal(), width=80)
    assert not re.search(r"\x1b\[[\d;]*3\d", printed(console, "x", style="red"))
