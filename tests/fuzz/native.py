"""The native entry points, called on memory of our own: odd shapes, strides, spans, threads.

Every tensor has its own block of memory with bytes around it that must not change; under
AddressSanitizer, with ``PYTHONMALLOC=malloc``, reads beyond it are found as well.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import math
import os
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fuzz.driver import Draws, main, refused

PACKAGE = Path(
    os.environ.get("DREAM_KERNELS_NATIVE", Path(__file__).resolve().parents[2] / "dream_kernels")
)
SEEDS = [random.Random(i).randbytes(160) for i in range(32)]
NAMES = (
    "dtype", "query", "key", "value", "prefix_key", "prefix_value", "scores", "spans", "mask",
    "positions", "sinks", "heads", "mode", "document_mass", "scale", "causal", "window", "softcap",
    "output", "state", "segment_outputs", "grad_output", "threads", "mass",
)  # fmt: skip
EXTREMES = (
    0, 1, -1, 2, -2, 3, 7, 48, 64, 65, 255, 2**16, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32,
    2**32 + 1, 2**61, 2**62, 2**63 - 1, -(2**31), -(2**31) - 1, -(2**62), -(2**63), 2**63, 2**64,
)  # fmt: skip
OPTIONAL = ("prefix_key", "prefix_value", "mask", "positions", "sinks")
GRADIENTS = ("query", "key", "value", "scores", "prefix_key", "prefix_value", "sinks")
# Near each other and, more rarely, at both ends of their range.
POSITIONS = (0, 0, 0, 0, 20, 20, 2**31, -(2**63), 2**63 - 9)
# More would be a long computation, not a hang.
MOST_PRODUCTS = 1e7
_GUARD = 64


def load_native() -> ModuleType:
    """Import the extension by itself, since its package would import torch."""
    name = "dream_kernels._native"
    if name not in sys.modules:
        (path,) = (p for p in PACKAGE.glob("_native*") if p.suffix in (".so", ".pyd"))
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class Block:
    """A tensor in memory of its own, between guards."""

    def __init__(self, shape: list[int], size: int, fill: bytes = b"\x3f") -> None:
        self.shape, self.size = list(shape), size
        self.strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        self.bytes = math.prod(shape) * size
        self._memory = ctypes.create_string_buffer(self.bytes + 2 * _GUARD + 16)
        base = ctypes.addressof(self._memory)
        self._start = (-base) % 16 + _GUARD
        self.address = self.memory = base + self._start
        ctypes.memset(base, 0xA5, len(self._memory))
        ctypes.memset(self.memory, fill[0], self.bytes)

    def write_int64(self, values: list[int]) -> None:
        array = (ctypes.c_int64 * len(values)).from_address(self.memory)
        for i, value in enumerate(values):
            array[i] = (value + 2**63) % 2**64 - 2**63

    def argument(self) -> tuple:
        return self.address, self.shape, self.strides, self.memory, self.bytes

    def intact(self) -> bool:
        raw = self._memory.raw
        around = raw[: self._start] + raw[self._start + self.bytes :]
        return not around.strip(b"\xa5")


def _distort(draws: Draws, block: Block) -> None:
    """Change a tensor's shape, strides or address."""
    kind = draws.below(7)
    # An earlier distortion may have given it more sizes than strides.
    at = draws.below(max(1, min(len(block.shape), len(block.strides))))
    if kind == 0:
        block.shape[at] = draws.choice_of_extremes()
    elif kind == 1:
        block.strides[at] = draws.choice_of_extremes()
    elif kind == 2:  # two at once, so that a product overflows
        block.shape[at] = draws.choice_of_extremes()
        block.strides[at] = draws.choice_of_extremes()
    elif kind == 3:
        block.strides = [0] * len(block.strides)
    elif kind == 4:
        block.address += draws.choose((1, 2, 4, 8, -4, 64, 4096, -block.address))
    elif kind == 5:
        block.shape.append(1)
    else:  # from the end backwards, which is valid
        at %= len(block.strides)
        block.address += (block.shape[at] - 1) * block.strides[at] * block.size
        block.strides[at] = -block.strides[at]


class _Draws(Draws):
    def choice_of_extremes(self) -> int:
        return self.choose(EXTREMES)


class Case:
    """What one input encodes: a small valid call, partly distorted."""

    def __init__(self, data: bytes) -> None:
        draws = _Draws(data)
        batch, key_heads, group = 1 + draws.below(3), 1 + draws.below(2), 1 + draws.below(3)
        rows, local, prefix = 1 + draws.below(5), draws.below(70), draws.below(40)
        dim, documents = draws.choose((1, 3, 8, 16, 17, 64)), 1 + draws.below(4)
        dtype = draws.choose(("float32", "bfloat16", "float16"))
        size = 4 if dtype == "float32" else 2
        heads, length = key_heads * group, local + prefix
        queries = [batch, heads, rows, dim]
        prefixes = [draws.choose((1, batch)), key_heads, prefix, dim]
        score_heads = draws.choose((1, heads))
        # 1.8 or 0.7, NaN in every type, or nearly 0.
        fill = draws.choose((b"\x3f", b"\x3f", b"\xff", b"\x01"))
        self.inputs = {
            "query": Block(queries, size, fill),
            "key": Block([batch, key_heads, local, dim], size, fill),
            "value": Block([batch, key_heads, local, dim], size),
            "scores": Block([batch, score_heads, documents], 4),
            "spans": Block([batch, documents, 2], 8),
            "heads": Block([heads], 1, draws.choose((b"\0", b"\1"))),
        }
        if prefix:
            self.inputs["prefix_key"] = Block(prefixes, size)
            self.inputs["prefix_value"] = Block(prefixes, size)
        if draws.below(2):
            self.inputs["mask"] = Block([batch, length], 1, draws.choose((b"\0", b"\1", b"\xff")))
        spans = []
        for _ in range(batch):
            cuts = sorted(draws.below(length + 1) for _ in range(2 * documents))
            spans += cuts
        if draws.below(4) == 0:
            spans[draws.below(len(spans))] = draws.choice_of_extremes()
        self.inputs["spans"].write_int64(spans)
        window = draws.choose((*[None] * 8, 1, 3, 3, 20, 20, 2**31, 2**62, EXTREMES))
        if window == EXTREMES:
            window = draws.choice_of_extremes()
        if window is not None and draws.below(4):
            self.inputs["positions"] = Block([batch, length], 8)
            period = [draws.choose(POSITIONS) + draws.below(9) for _ in range(2 + draws.below(12))]
            positions = [period[i % len(period)] for i in range(batch * length)]
            self.inputs["positions"].write_int64(positions)
        if draws.below(2):
            self.inputs["sinks"] = Block([heads], 4, fill)
        segments = documents + 1
        self.outputs = {
            "output": Block(queries, size),
            "state": Block([batch, heads, rows, segments], 4),
            "segment_outputs": Block([batch, heads, rows, segments * dim], size),
            "grad_output": Block(queries, size),
            "mass": Block([batch, heads, rows, documents], 4),
        }
        self.gradients = {
            name: Block(self.inputs[name].shape, 4 if name in ("scores", "sinks") else size)
            for name in GRADIENTS
            if name in self.inputs and draws.below(4)
        }
        self.options: dict[str, Any] = {
            "dtype": dtype,
            "mode": draws.choose(("reweight", "bias")),
            "document_mass": None,
            "scale": draws.choose((0.1, 1.0, 0.0, -1.0, 1e38)),
            "causal": bool(draws.below(2 if window is None else 16)),
            "window": window,
            "softcap": draws.choose((None, None, 0.5, 30.0, 1e-300, 1e300)),
        }
        if self.options["mode"] == "reweight":
            self.options["document_mass"] = draws.choose((None, 0.5, 1.0))
        odd = draws.below(24)
        if odd < 3:
            name = ("document_mass", "scale", "softcap")[odd]
            self.options[name] = draws.choose((0.0, -1.0, math.nan, math.inf, -math.inf, 2.0))
        self.threads = draws.choose((1, 1, 1, 1, 2, 3, 16, 2**31 - 1))
        if draws.below(16) == 0:
            self.threads = draws.choose((0, -1, -(2**31), 2**31, 2**64))
        self.everything = [*self.inputs.values(), *self.outputs.values(), *self.gradients.values()]
        for _ in range(draws.choose((0, 0, 1, 1, 2, 3))):
            _distort(draws, draws.choose(self.everything))
        if draws.below(32) == 0:
            self.options[draws.choose(("dtype", "mode"))] = draws.choose(("", "float64", "\0", "x"))
        self.dropped = draws.choose((*[None] * 9, "prefix_key", "prefix_value"))

    def problem(self, native: ModuleType) -> Any:
        arguments: dict[str, Any] = dict.fromkeys(OPTIONAL)
        arguments |= {name: block.argument() for name, block in self.inputs.items()}
        if self.dropped:
            arguments[self.dropped] = None
        return native.Problem(**arguments, **self.options)

    def is_short(self) -> bool:
        query, key = self.inputs["query"].shape, self.inputs["key"].shape
        prefix = self.inputs["prefix_key"].shape[2] if "prefix_key" in self.inputs else 0
        keys = (key[2] if len(key) > 2 else 0) + prefix
        documents = math.prod(self.inputs["spans"].shape)
        return math.prod(query) * (keys + documents + 1) < MOST_PRODUCTS

    def run(self, native: ModuleType) -> int:
        """Make all calls and return how many of them ran."""
        made: list[Any] = []
        if refused(lambda: made.append(self.problem(native)), *NAMES):
            return 0
        if not self.is_short():
            return 1
        out = {name: block.argument() for name, block in self.outputs.items()}
        grads: dict[str, Any] = dict.fromkeys(GRADIENTS)
        grads |= {name: block.argument() for name, block in self.gradients.items()}
        problem, threads = made[0], {"threads": self.threads}
        kept = {"segment_outputs": out["segment_outputs"]}
        first = {"output": out["output"], "state": out["state"]}
        common = {"state": out["state"], "grad_output": out["grad_output"]}
        scores = self.gradients.get("scores", self.inputs["scores"]).argument()
        calls = (
            lambda: native.forward(problem, **first, segment_outputs=None, **threads),
            lambda: native.forward(problem, **first, **kept, **threads),
            lambda: native.backward(problem, **common, output=out["output"], **grads, **threads),
            lambda: native.backward_of_scores(problem, **common, **kept, scores=scores, **threads),
            lambda: native.document_mass(problem, mass=out["mass"], **threads),
        )
        return 1 + sum(not refused(call, *NAMES) for call in calls)


_native: ModuleType | None = None


def check(data: bytes) -> None:
    """Raise if a call does anything but run within its memory or be refused by name."""
    global _native
    _native = _native or load_native()
    case = Case(data)
    case.run(_native)
    if not all(block.intact() for block in case.everything):
        raise AssertionError("a call wrote beyond its memory")


if __name__ == "__main__":
    main(check, SEEDS)
