"""Small calls of every entry point of the native extension, without torch, for valgrind.

Run by ``make test-valgrind``. Each tensor is a heap block of its own, so that an access beyond it
is reported, and every result is checked for numbers that nobody wrote.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import itertools
import math
import os
import random
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[2] / "dream_kernels"
BATCH, HEADS, KEY_HEADS, ROWS, LOCAL, PREFIX, HEAD_DIM = 2, 4, 2, 7, 9, 37, 24
LENGTH = PREFIX + LOCAL
SPANS = (2, 11, 11, 12, 15, 36)  # three documents
DOCUMENTS = len(SPANS) // 2

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_random = random.Random(0)
_null = os.open(os.devnull, os.O_WRONLY)


class Array:
    """A contiguous tensor; its numbers repeat ``numbers``, or are never written."""

    def __init__(self, kind: type, shape: tuple[int, ...], numbers: tuple = ()) -> None:
        size = math.prod(shape)
        address = _libc.malloc(size * ctypes.sizeof(kind))
        self.values = (kind * size).from_address(address)
        for i in range(size if numbers else 0):
            self.values[i] = numbers[i % len(numbers)]
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        self.argument = (address, shape, strides, address, size * ctypes.sizeof(kind))

    def check(self) -> None:
        if not all(map(math.isfinite, self.values)):
            sys.exit("a result is not finite")
        # The kernel is handed every byte: valgrind reports those that nobody wrote.
        os.write(_null, self.values)


def normal(*shape: int) -> Array:
    return Array(ctypes.c_float, shape, tuple(_random.gauss(0, 1) for _ in range(math.prod(shape))))


def unwritten(*shape: int) -> Array:
    return Array(ctypes.c_float, shape)


def load_native() -> ModuleType:
    """Import the extension by itself: its package would import torch."""
    (path,) = (p for p in PACKAGE.glob("_native*") if p.suffix in (".so", ".pyd"))
    loader = importlib.machinery.ExtensionFileLoader("_native", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
    loader.exec_module(module)
    return module


def run(
    native: ModuleType, mode: str, document_mass: float | None, causal: bool, options: bool
) -> None:
    queries = (BATCH, HEADS, ROWS, HEAD_DIM)
    local = (BATCH, KEY_HEADS, LOCAL, HEAD_DIM)
    prefix = (1, KEY_HEADS, PREFIX, HEAD_DIM)
    inputs = {
        "query": normal(*queries),
        "key": normal(*local),
        "value": normal(*local),
        "prefix_key": normal(*prefix),
        "prefix_value": normal(*prefix),
        "scores": normal(BATCH, 1, DOCUMENTS),
        "spans": Array(ctypes.c_int64, (BATCH, DOCUMENTS, 2), SPANS),
        "mask": Array(ctypes.c_bool, (BATCH, LENGTH), (False, *[True] * 45)),
        "heads": Array(ctypes.c_bool, (HEADS,), (True, True, False, True)),
    }
    given: dict[str, tuple | None] = {name: array.argument for name, array in inputs.items()}
    # Positions that start anew at every document, one that no 32 bits hold, and a window of them.
    positions = Array(ctypes.c_int64, (BATCH, LENGTH), (2**40, *range(10), 5, *range(34)))
    sinks = normal(HEADS)
    windows = options and causal
    given["positions"] = positions.argument if windows else None
    given["sinks"] = sinks.argument if options else None
    problem = native.Problem(
        dtype="float32",
        mode=mode,
        document_mass=document_mass,
        scale=HEAD_DIM**-0.5,
        causal=causal,
        window=20 if windows else None,
        softcap=2.0 if options else None,
        **given,
    )
    segments = DOCUMENTS + 1
    output, state = unwritten(*queries), unwritten(BATCH, HEADS, ROWS, segments)
    kept = unwritten(BATCH, HEADS, ROWS, segments * HEAD_DIM)
    grad_output = normal(*queries)
    for segment_outputs in (None, kept.argument):
        native.forward(
            problem,
            output=output.argument,
            state=state.argument,
            segment_outputs=segment_outputs,
            threads=2,
        )
        output.check()
    wanted = {
        "query": unwritten(*queries),
        "key": unwritten(*local),
        "value": unwritten(*local),
        "scores": unwritten(BATCH, 1, DOCUMENTS),
        "prefix_key": unwritten(*prefix),
        "prefix_value": unwritten(*prefix),
    }
    if options:
        wanted["sinks"] = unwritten(HEADS)
    native.backward(
        problem,
        state=state.argument,
        output=output.argument,
        grad_output=grad_output.argument,
        threads=2,
        **{"sinks": None, **{name: array.argument for name, array in wanted.items()}},
    )
    alone = unwritten(BATCH, 1, DOCUMENTS)
    native.backward_of_scores(
        problem,
        state=state.argument,
        segment_outputs=kept.argument,
        grad_output=grad_output.argument,
        scores=alone.argument,
        threads=2,
    )
    mass = unwritten(BATCH, HEADS, ROWS, DOCUMENTS)
    native.document_mass(problem, mass=mass.argument, threads=2)
    for array in (*wanted.values(), alone, mass):
        array.check()


def main() -> None:
    native = load_native()
    cases = (("reweight", None), ("reweight", 0.5), ("bias", None))
    both = (True, False)
    for (mode, document_mass), causal, options in itertools.product(cases, both, both):
        run(native, mode, document_mass, causal, options)
    print(f"valgrind case: nothing wrong with {native.instruction_set()}")


if __name__ == "__main__":
    main()
