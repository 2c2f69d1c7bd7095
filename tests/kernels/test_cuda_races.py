"""The CUDA kernels under ThreadSanitizer, in a program of their own: no barrier is missing.

In the emulator each thread of a block is a thread to the sanitizer, and only barriers order what
they do; blocks are not ordered at all. So two blocks that write one place are found, too.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from helpers.own_process import run_command

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["g++"]
RACE = 66
# The emulator tells the sanitizer what its instructions access, and is not watched itself.
EMULATOR = ("csrc/cuda/emulator.cpp", "csrc/cuda/fibre.cpp")
WATCHED = ("csrc/cuda/host_kernels.cpp", "csrc/cuda/attention.cpp", "tests/native/cuda_races.cpp")

pytestmark = [
    pytest.mark.slow,  # compiling with the sanitizer takes most of the time
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"{COMPILER[0]} is not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("races")
    command = [*COMPILER, "-std=c++17", "-O1", "-g1"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    tried = run_command(*command, "-fsanitize=thread", probe, "-o", folder / "probe")
    if tried.returncode != 0 or run_command(folder / "probe").returncode != 0:
        pytest.skip("the compiler has no ThreadSanitizer, or it does not run here")
    objects = [folder / f"{Path(source).stem}.o" for source in (*EMULATOR, *WATCHED)]
    for source, target in zip((*EMULATOR, *WATCHED), objects):
        flag = "-DDREAM_RACES" if source in EMULATOR else "-fsanitize=thread"
        run_command(*command, flag, "-c", ROOT / source, "-o", target, check=True)
    path = folder / "races"
    run_command(*COMPILER, "-fsanitize=thread", *objects, "-o", path, check=True)
    return path


@pytest.fixture(scope="module")
def barriers(program: Path) -> list[tuple[str, str]]:
    process = run_command(program)
    assert process.returncode == 0, process.stderr[:2000]
    return [(file, line) for file, line in map(str.split, process.stdout.splitlines())]


def is_found(program: Path, file: str, line: str) -> bool:
    environment = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"}
    process = run_command(program, file, line, env=environment)
    return process.returncode == RACE and "ThreadSanitizer: data race" in process.stderr


def test_there_is_no_race(barriers: list[tuple[str, str]]) -> None:
    """And all barriers of the kernels' sources are reached."""
    sources = [ROOT / "csrc/cuda" / file for file in {file for file, _ in barriers}]
    written = sum(source.read_text().count("sync_threads();") for source in sources)
    assert len(barriers) == written >= 10


def test_a_missing_barrier_is_a_race(program: Path, barriers: list[tuple[str, str]]) -> None:
    """One of each file."""
    for file, line in dict(barriers).items():
        assert is_found(program, file, line), (file, line)


@pytest.mark.slow
def test_any_missing_barrier_is_a_race(program: Path, barriers: list[tuple[str, str]]) -> None:
    for file, line in barriers:
        assert is_found(program, file, line), (file, line)
