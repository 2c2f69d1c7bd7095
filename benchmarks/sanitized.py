"""One small forward and backward of every implementation on a device, for sanitizers.

``python -m benchmarks.sanitized cuda [NUMBER OF CASES]``; a sanitizer runs this as its program.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from .adapters import ADAPTERS, Refusal
from .cases import GRADIENTS, Case, make_inputs
from .check import Oracle

# Sizes that fill no block: memory after the last row or key must not be accessed.
_SMALL = Case(
    "sanitized", batch=2, query_heads=4, key_heads=2, rows=19, local=19, prefix=83, covered=77,
    documents=3, dtype="bfloat16",
)  # fmt: skip
_CASES = [
    replace(
        _SMALL, head_dim=head_dim, mode=mode, shared=shared, dtype=dtype, scored=scored,
        gradients=gradients,
    )
    for head_dim in (64, 128)
    for mode in ("reweight", "bias")
    for shared, dtype, scored, gradients in (
        (True, "float32", 1.0, GRADIENTS),
        (False, "float16", 0.5, GRADIENTS),
        (True, "float16", 1.0, ("scores",)),
        (True, "bfloat16", 1.0, ("query", "scores")),
    )
]  # fmt: skip
# Long enough for a GPU to split the keys over programs.
_CASES += [replace(_SMALL, mode=mode, prefix=1100, covered=1090) for mode in ("reweight", "bias")]


def main(device: str, count: int = len(_CASES)) -> None:
    """Run the first ``count`` cases; a wrong result is an error."""
    ran = set()
    for case in _CASES[:count]:
        inputs = make_inputs(case, torch.device(device))
        oracle = Oracle(inputs)
        for name, adapter in ADAPTERS.items():
            if not name.startswith("ours") or name == "ours (reference)":
                continue
            prepared = adapter.setup(inputs)
            if isinstance(prepared, Refusal):
                continue
            complaint = oracle.complaint(adapter, prepared)
            if complaint is not None:
                sys.exit(f"{name}, {case}: {complaint}")
            ran.add(name)
    if not ran:
        sys.exit(f"no fused implementation runs on {device}")
    print(f"{', '.join(sorted(ran))}: {count} cases on {device}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
