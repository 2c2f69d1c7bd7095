"""Kills a run again and again, lets it finish, and compares it with an uninterrupted one.

Every run is a forked child of the process, so that the imports are paid for once.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dream_training.config import TrainConfig
from dream_training.training.driver import train

# File system calls that write a checkpoint or a model, or replace one.
POINTS = ("fsync", "rename", "replace", "mkdir", "unlink")
# Measured times, which differ between runs.
TIMED = ("seconds",)


def run(config: TrainConfig, before: Callable[[], None] = lambda: None) -> int:
    """Start a run in a child and return its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        before()
        train(config, console=Console(file=io.StringIO()), resume=True)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def kill_after(config: TrainConfig, seconds: float) -> bool:
    """Kill a run after some time; False if it ended before."""
    process = run(config)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def kill_at(config: TrainConfig, point: str, count: int) -> bool:
    """Kill a run at a file system call; False if there were fewer calls."""

    def before() -> None:
        original, calls = getattr(os, point), [0]

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, point, counted)

    _, status = os.waitpid(run(config, before), 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError("a run failed")
    return os.WIFSIGNALED(status)


def outcome(folder: Path) -> dict:
    """What two equal runs must share, to the bit."""
    history = json.loads((folder / "history.json").read_text())
    for step in history["steps"]:
        for name in TIMED:
            step.pop(name, None)
    files = {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for name in ("best", "last")
        for path in sorted((folder / name).rglob("*.safetensors"))
    }
    examples = json.loads((folder / "examples.json").read_text())
    return {"history": history, "files": files, "examples": examples}


def kill_and_compare(config: TrainConfig, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Return how many kills there were, at what, in how many whole runs, and what differs.

    Args:
        config: of the run.
        folder: for the outputs.
        kills: how many at least.
        seed: of where they hit.
    """
    torch.set_num_threads(1)
    alone = config.with_changes(output_dir=str(folder / "alone"))
    killed = config.with_changes(output_dir=str(folder / "killed"))
    begin = time.perf_counter()
    _, status = os.waitpid(run(alone), 0)
    assert status == 0, "the run that was left alone failed"
    seconds = time.perf_counter() - begin
    generator = random.Random(seed)
    moments: list[str] = []
    differs: list[str] = []
    rounds = 0
    while len(moments) < kills or Path(killed.output_dir).exists():
        if len(moments) >= kills:
            _, status = os.waitpid(run(killed), 0)
            assert status == 0, "the last run failed"
            finished = True
        elif len(moments) % 2:
            moment = seconds * generator.random()
            finished = not kill_after(killed, moment)
            moments += [] if finished else [f"after {moment:.2f} s"]
        else:
            point, count = generator.choice(POINTS), generator.randint(1, 12)
            finished = not kill_at(killed, point, count)
            moments += [] if finished else [f"{point} {count}"]
        if finished:
            rounds += 1
            first, second = outcome(Path(alone.output_dir)), outcome(Path(killed.output_dir))
            differs += [key for key in first if first[key] != second[key]]
            differs += [str(p) for p in Path(killed.output_dir).rglob(".*") if p.suffix == ".tmp"]
            shutil.rmtree(killed.output_dir)
    return {"kills": len(moments), "rounds": rounds, "moments": moments, "differs": differs}
