"""Small forwards and backwards of every implementation on a device, against the reference.

``python -m benchmarks.sanitized cuda [NUMBER OF CASES]``; a sanitizer runs this as its program.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from .adapters import ADAPTERS, Refusal
from .cases import DTYPES, GRADIENTS, Case, make_inputs
from .check import Oracle

# Sizes that fill no block: memory after the last row or key must not be accessed.
_SMALL = Case(
    "small", batch=2, query_heads=4, key_heads=2, rows=19, local=19, prefix=83, covered=77,
    documents=3, dtype="bfloat16",
)  # fmt: skip
_LONG = replace(_SMALL, name="split", prefix=1100, covered=1090)


def checked_cases() -> list[Case]:
    """A dozen kinds of call in every dtype, the dtypes of training first."""
    all_kinds: list[tuple[str, dict[str, Any]]] = [
        ("all gradients", {}),
        ("own pool, half the heads, padding", {"shared": False, "scored": 0.5, "padding": 9}),
    ]
    kinds = [
        replace(_SMALL, name=f"{mode}, D {dim}, {what}", head_dim=dim, mode=mode, **changes)
        for mode in ("reweight", "bias")
        for dim in (64, 128)
        for what, changes in all_kinds
    ]
    kinds += [
        replace(_SMALL, name="reweight, D 64, scores only", gradients=("scores",)),
        replace(_SMALL, name="reweight, D 128, query and scores", head_dim=128,
                gradients=("query", "scores")),
        replace(_LONG, name="reweight, D 64, split"),
        replace(_LONG, name="bias, D 128, split", head_dim=128, mode="bias"),
    ]  # fmt: skip
    order = ("bfloat16", "float16", "float32")
    assert set(order) == set(DTYPES)
    return [replace(kind, dtype=dtype) for dtype in order for kind in kinds]


def complaints(case: Case, device: torch.device) -> dict[str, str | None]:
    """What is wrong with each fused implementation that can run a case, None if nothing is."""
    inputs = make_inputs(case, device)
    oracle = Oracle(inputs)
    found = {}
    for name, adapter in ADAPTERS.items():
        if not name.startswith("ours") or name == "ours (reference)":
            continue
        prepared = adapter.setup(inputs)
        if not isinstance(prepared, Refusal):
            found[name] = oracle.complaint(adapter, prepared)
    if not found:
        raise SystemExit(f"no fused implementation runs on {device}")
    return found


# All gradients are in the first case, split heads and keys in the last.
_SANITIZED = [
    replace(_SMALL, gradients=GRADIENTS, padding=9),
    replace(_SMALL, head_dim=128, dtype="float16", gradients=("query", "scores")),
    _LONG,
]


def main(device: str, count: int = len(_SANITIZED)) -> None:
    """Run the first ``count`` cases; a wrong result is an error."""
    ran = set()
    for case in _SANITIZED[:count]:
        for name, complaint in complaints(case, torch.device(device)).items():
            if complaint is not None:
                sys.exit(f"{name}, {case}: {complaint}")
            ran.add(name)
    print(f"{', '.join(sorted(ran))}: {count} cases on {device}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
