"""The first call of a process, which a user waits for once.

Run ``python -m benchmarks.cold cuda``. With an empty ``TRITON_CACHE_DIR`` the call compiles and
tunes every kernel; a second run with the same folder only tunes.
"""

from __future__ import annotations

import sys
import time

import torch

from .adapters import ADAPTERS, Prepared
from .cases import gpu_cases, make_inputs, rehearsal_cases
from .check import run


def main(where: str) -> None:
    """Time the first and the second forward and backward of one case on a device."""
    device = torch.device(where)
    on_gpu = device.type == "cuda"
    inputs = make_inputs((gpu_cases() if on_gpu else rehearsal_cases())[0], device)
    ours = (adapter for name, adapter in ADAPTERS.items() if name.startswith("ours"))
    for adapter in ours:
        prepared = adapter.setup(inputs)
        if isinstance(prepared, Prepared):
            break
    else:
        sys.exit(f"no implementation of ours runs on {device}")
    seconds = []
    for _ in range(2):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.monotonic()
        run(prepared)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    first, second = seconds
    print(f"{adapter.name}: {first:.2f} s, the second call {1e3 * second:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1])
