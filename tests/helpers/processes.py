"""Processes that are started once and then run many cases together, over gloo."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from helpers.own_process import TIMEOUT_S, forkserver


class Processes:
    """``size`` processes of one group, which run named functions of ``distributed_cases``.

    Args:
        size: how many.
        folder: for the file by which they find each other.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = forkserver()
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(folder / "meet"), there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, name: str, *args: Any, **options: Any) -> list[Any]:
        """Return what ``distributed_cases.name(...)`` gives in every process, in their order."""
        for pipe in self.pipes:
            pipe.send((name, args, options))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                errors.append(f"process {rank} gives no answer")
                break
            result, error = pipe.recv()
            results.append(result)
            if error is not None:
                errors.append(f"process {rank}:\n{error}")
                break  # the others may wait for it
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from helpers import distributed_cases

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    while True:
        try:
            name, args, options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((getattr(distributed_cases, name)(*args, **options), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
