"""Files written whole: links, devices, pipes, permissions, and writers that fail or are killed."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dream_kernels import HeadFile, write_heads
from dream_kernels.files import (
    is_standard_output,
    is_stream,
    open_whole,
    recover,
    whole_folder,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "new" / "a.txt", "1")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir(0o700)
        (folder / "inner" / "b").touch(0o600)
    for path in tmp_path.rglob("*"):
        own = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == own & ~umask, path


def test_the_text_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "é\r\n\n")
    assert path.read_bytes() == "é\r\n\n".encode()


@pytest.mark.parametrize("there", [True, False], ids=["target", "dangling"])
def test_links_are_written_through(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "file", tmp_path / "link", tmp_path / "second"
    link.symlink_to(Path("far") / "file")
    second.symlink_to(link)
    if there:
        target.write_text("old, and longer")
    write_text(second, "new")
    assert second.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert target.read_text() == "new" and names(tmp_path / "far") == ["file"]


@pytest.mark.parametrize("there", [True, False], ids=["target", "dangling"])
def test_links_to_folders_are_written_through(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "far" / "folder", tmp_path / "link"
    link.symlink_to(target)
    if there:
        target.mkdir(parents=True)
        (target / "old").touch()
    with whole_folder(link) as folder:
        (folder / "new").touch()
    assert link.is_symlink() and names(target) == ["new"] and names(tmp_path) == ["far", "link"]


def test_a_cycle_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="/a: its symbolic links lead in a circle"):
        write_text(tmp_path / "a", "x")
    assert names(tmp_path) == ["a", "b"]


def test_a_pipe_is_written_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before, read = os.stat(pipe), []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert is_stream(pipe) and not is_standard_output(pipe)
    write_heads(pipe, HeadFile([(2, 1)]))
    reader.join()
    assert b"attn_head_set: 2-1" in read[0]
    assert os.path.samestat(before, os.stat(pipe)) and stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert names(tmp_path) == ["pipe"]


def test_a_device_is_written_and_stays() -> None:
    """A terminal of the test's own, by its name and through a link."""
    ours, theirs = pty.openpty()
    try:
        device = Path(os.ttyname(theirs))
        before = os.stat(device)
        assert stat.S_ISCHR(before.st_mode)
        write_text(device, "through the device\n")
        assert os.read(ours, 100).split() == [b"through", b"the", b"device"]
        after = os.stat(device)
        assert os.path.samestat(before, after) and before.st_mode == after.st_mode
    finally:
        os.close(ours)
        os.close(theirs)


_WRITE = """
import sys
from dream_kernels.files import write_text
for name in sys.argv[1:]:
    print("before")
    write_text(name, f"to {name}\\n")
    print("after")
"""


@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output_is_written_by_every_name(tmp_path: Path, to: str) -> None:
    """Standard output of a separate process: a file, whose link stays, or a pipe."""
    outputs = ("-", "/dev/stdout", "/dev/fd/1")
    command = [sys.executable, "-c", _WRITE, *outputs]
    if to == "pipe":
        text = subprocess.run(command, stdout=subprocess.PIPE, cwd=tmp_path, check=True).stdout
    else:
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, cwd=tmp_path, check=True)
        text = (tmp_path / "out").read_bytes()
    assert text.decode() == "".join(f"before\nto {name}\nafter\n" for name in outputs)
    assert names(tmp_path) == (["out"] if to == "file" else [])


def test_a_writer_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), open_whole(tmp_path / "a") as stream:
        stream.write("half of it" * (1 // 0))
    with whole_folder(tmp_path / "f") as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "f"):
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a", "f"] and names(tmp_path / "f") == ["old"]


def test_a_folder_that_cannot_be_moved_restores_the_old_one(tmp_path: Path, monkeypatch) -> None:
    with whole_folder(tmp_path / "f") as folder:
        (folder / "old").touch()
    original = os.rename

    def rename(source, target):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "f"):
        pass
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["old"]


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "f", replace=False) as late:
        (late / "late").touch()
        with whole_folder(tmp_path / "f", replace=False) as early:
            (early / "early").touch()
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["early"]


def test_concurrent_writers_leave_one_complete_folder(tmp_path: Path) -> None:
    def write(_: int) -> None:
        with whole_folder(tmp_path / "model", replace=False) as folder:
            for number in range(20):
                (folder / str(number)).write_text("content")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(8)))
    assert names(tmp_path) == ["model"] and len(names(tmp_path / "model")) == 20


def test_what_a_killed_writer_left_is_finished_or_removed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.tmp").touch()
    (tmp_path / ".other.01234567.tmp").touch()
    write_text(tmp_path / "a", "old")
    with whole_folder(tmp_path / "f") as folder:
        (folder / "old").touch()
    script = (
        "import os, sys; from dream_kernels import files\n"
        "stream = files.open_whole('a'); stream.__enter__().write('half')\n"
        "folder = files.whole_folder('f'); (folder.__enter__() / 'new').touch()\n"
        "original = os.rename\n"
        "def rename(a, b):\n"
        "    if str(a).endswith('new'): os._exit(7)\n"
        "    original(a, b)\n"
        "os.rename = rename\n"
        "folder.__exit__(None, None, None)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path).returncode == 7
    assert len(names(tmp_path)) == 5 and not (tmp_path / "f").exists()
    recover(tmp_path)
    assert names(tmp_path) == [".other.01234567.tmp", "a", "f", "mine.tmp"]
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path / "f") == ["new"]


def test_mistakes_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder; expected a file"):
        write_text(tmp_path, "x")
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileExistsError, match="file is a file; expected a folder"),
        whole_folder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OSError, match=r"/proc/self/nothing'$"):
        write_text("/proc/self/nothing", "x")
    assert names(tmp_path) == ["file"]
