"""The processes of a run: rank, size and what they exchange.

With one process nothing here communicates.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dream_training.distributed.launched import launched

Result = TypeVar("Result")


def rank() -> int:
    """The number of this process, 0 for the one that writes and prints."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def join(device: str | None = None, timeout_s: float = 600.0) -> str | None:
    """Join the processes that ``torchrun`` or ``accelerate launch`` has started.

    Does nothing if there is only one process, or if they have joined already.

    Args:
        device: ``cpu``, ``cuda`` or None for a GPU if there is one.
        timeout_s: how long a process waits for the others before it fails, in seconds.

    Returns:
        The device of this process, ``device`` itself if there is only one.

    Raises:
        ValueError: ``device`` names one GPU, which all processes of a machine would share.
    """
    if launched() == 1 and not _joined():
        return device
    if device is not None and ":" in device:
        raise ValueError(
            f"device must be 'cpu', 'cuda' or null with several processes, got {device!r}: each "
            "takes a GPU of its own"
        )
    cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not cpu:
        torch.cuda.set_device(local)
    if not _joined():
        dist.init_process_group(
            backend="gloo" if cpu else "cuda:nccl,cpu:gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    return "cpu" if cpu else f"cuda:{local}"


def leave() -> None:
    """Leave the group of processes; all of them call it."""
    if _joined():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        max_over_ranks(0)


def on_main(run: Callable[[], Result]) -> Result:
    """Run a function in process 0 only and return its result in all processes.

    Args:
        run: returns a value that JSON can hold.

    Raises:
        Exception: in process 0, what ``run`` raises.
        RuntimeError: in the others, that ``run`` has failed.
    """
    if size() == 1:
        return run()
    result: Any = None
    error: Exception | None = None
    if is_main():
        try:
            result = run()
        except Exception as caught:
            error = caught
    told = broadcast_json([result, None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    if told[1] is not None:
        raise RuntimeError(f"process 0 has failed: {told[1]}")
    return told[0]


def gather_json(value: Any) -> list[Any]:
    """Return the values of all processes by rank; as JSON, so that nothing is unpickled."""
    if size() == 1:
        return [value]
    own = _encoded(value)
    counts = [torch.zeros_like(_count(own)) for _ in range(size())]
    dist.all_gather(counts, _count(own))
    longest = max(int(count) for count in counts)
    parts = [own.new_empty(longest) for _ in range(size())]
    dist.all_gather(parts, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [_decoded(part[: int(count)]) for part, count in zip(parts, counts)]


def broadcast_json(value: Any) -> Any:
    """Return the value of process 0."""
    if size() == 1:
        return value
    own = _encoded(value)
    count = _count(own)
    dist.broadcast(count, src=0)
    if not is_main():
        own = own.new_empty(int(count))
    dist.broadcast(own, src=0)
    return _decoded(own)


def max_over_ranks(value: int) -> int:
    """The largest of the processes' values."""
    if size() == 1:
        return value
    most = torch.tensor(value, device=_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Sums of the processes' values; all of them give the same names in the same order."""
    if size() == 1:
        return dict(values)
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=_device())
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where tensors must be for a collective of the default group."""
    if "gloo" in dist.get_backend() or "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _encoded(value: Any) -> Tensor:
    text = json.dumps(value).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(_device())


def _decoded(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def _count(data: Tensor) -> Tensor:
    return torch.tensor(len(data), device=data.device)
