"""Runs what kills, signals, exhausts memory or may crash in its own process, with a time limit."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from dream_training.startup import QUIET_LIBRARIES

# For what takes a minute at most on an idle machine. It ends what hangs, and measures nothing.
TIMEOUT_S = float(os.environ.get("DREAM_TEST_TIMEOUT_S", "900"))

_TESTS = Path(__file__).parents[1]
_PRELOADED = ["helpers.distributed_cases", "dream_training.cli", "dream_training.training.driver"]


@cache
def forkserver() -> Any:
    """The context whose processes are forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", *QUIET_LIBRARIES)}
    # Some Pythons give the server no other way to find modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS), *filter(None, sys.path)])
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def in_own_process(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what a function gives in a process of its own.

    Args:
        function: of a module, not of another function; its process imports it by name.
        args: what it gets; they are pickled, as is what it returns.
        options: likewise.

    Raises:
        AssertionError: it raised, its process crashed, or it took too long.
    """
    here, there = forkserver().Pipe(duplex=False)
    process = forkserver().Process(target=_answer, args=(there, function, args, options))
    process.start()
    there.close()
    try:
        wait([here, process.sentinel], TIMEOUT_S)
        if here.poll():
            result, error = here.recv()
        elif process.is_alive():
            result, error = None, f"no answer after {TIMEOUT_S} s"
        else:
            process.join()
            result, error = None, f"ended with exit code {process.exitcode}"
    except EOFError:
        process.join(TIMEOUT_S)
        result, error = None, f"ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()
    assert error is None, f"{function.__name__} in a process of its own: {error}"
    return result


def _answer(pipe: Any, function: Callable[..., Any], args: tuple, options: dict) -> None:
    # Processes that it starts itself start as elsewhere, not from the server.
    multiprocessing.set_start_method(None, force=True)
    try:
        answer = (function(*args, **options), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    pipe.send(answer)


def run_command(
    *command: Any, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command as ``subprocess.run`` does, with its output as text, for a bounded time."""
    done = subprocess.run(
        [str(part) for part in command],
        **{"capture_output": True, "text": True, "timeout": TIMEOUT_S, "check": False, **options},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def run_dream(
    *arguments: Any,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    processes: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Run ``dream`` in a forked process, whose libraries are loaded already, as a shell would.

    Variables that libraries read when they are imported have the values of the fork server; all
    others, also ``CUDA_VISIBLE_DEVICES``, are as given.

    Args:
        arguments: of the command.
        cwd: its working directory.
        env: its whole environment; that of this process by default.
        processes: how many to start; several form one group, as under ``torchrun``.

    Returns:
        As :func:`run_command` does, with the outputs of all processes in one text and the exit
        code of the one that failed first; the others are killed then.

    Raises:
        AssertionError: it took too long.
    """
    command = ["dream", *map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="dream-test-") as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        store, ranks = _meeting(processes)
        children = [
            forkserver().Process(
                target=_dream, args=(command, cwd or os.getcwd(), {**environment, **own}, outputs)
            )
            for own in ranks
        ]
        end = time.monotonic() + TIMEOUT_S
        try:
            for child in children:
                child.start()
            while running := [child.sentinel for child in children if child.exitcode is None]:
                ended = wait(running, max(end - time.monotonic(), 0))
                assert ended, f"{' '.join(command)}: not done after {TIMEOUT_S} s"
                if any(child.exitcode for child in children):
                    break
            codes = [child.exitcode for child in children]
        finally:
            for child in children:
                child.kill()
                child.join()
            del store
        return subprocess.CompletedProcess(
            command, next(filter(None, codes), 0), *(Path(path).read_text() for path in outputs)
        )


def _meeting(processes: int) -> tuple[Any, list[dict[str, str]]]:
    """The store by which processes find each other, and what torchrun sets for each of them."""
    if processes == 1:
        return None, [{}]
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return store, [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]


def _dream(command: list[str], cwd: str, environment: dict[str, str], outputs: list[str]) -> None:
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # read when the server imported torch
        torch.set_num_threads(int(threads))
    sys.argv = command
    from dream_training.cli import main

    # A forked process runs none of these by itself; those of the server's imports are not its own.
    atexit._clear()
    try:
        main()
    finally:
        atexit._run_exitfuncs()
