"""Runs what kills, signals, exhausts or may crash in a process of its own, for a bounded time."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# For what takes a minute at most on a machine of its own. It ends what hangs, and measures nothing.
TIMEOUT_S = float(os.environ.get("DREAM_TEST_TIMEOUT_S", "900"))

_TESTS = Path(__file__).parent


@cache
def forkserver() -> Any:
    """The context whose processes are forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_cases", "dream_training.training.driver"])
    folders = [str(_TESTS / name) for name in ("distributed", "training", ".")]
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "TRANSFORMERS_VERBOSITY")}
    # Some Pythons give the server no other way to find modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, sys.path)])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
        function: of a module, not of another function; its process finds it by its name.
        args: what it gets; they are pickled, as is what it returns.
        options: likewise.

    Raises:
        AssertionError: it has raised, its process has died, or it took too long.
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
            result, error = None, f"died with exit code {process.exitcode}"
    except EOFError:
        process.join(TIMEOUT_S)
        result, error = None, f"died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()
    assert error is None, f"{function.__name__} in a process of its own: {error}"
    return result


def _answer(pipe: Any, function: Callable[..., Any], args: tuple, options: dict) -> None:
    # What it starts itself is started as elsewhere, not from the server.
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
