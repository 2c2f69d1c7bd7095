"""What a user waits for once: the first call of a process.

``python -m benchmarks.cold cuda`` says it. Run with an empty ``TRITON_CACHE_DIR`` it compiles and
tunes every kernel of the call; run again with the same folder it tunes only.
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
