"""Times predicted for an H100 from what the compiled kernels execute, and how good that is.

A tile's time on a multiprocessor is, with ``w`` warpgroups resident,

    w (tensor + max(issue, special)) + waits * WAIT + barriers * BARRIER,

but at least what its keys and values take from the second-level cache. *tensor*, *issue* and
*special* are the cycles of one warpgroup on the tensor cores, on an instruction scheduler and on
the special function units. Within a tile products and other instructions exclude each other: the
warps of a program meet at barriers, and FlashAttention 3, which takes turns, reaches that sum but
no more. A program's tiles follow each other, and programs fill the multiprocessors in whole waves.

The rates are the data sheet's or assumed as said beside them, not fitted, but the formula was
chosen with the published figures known. How wrong both are is what the comparison with them says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_kernels.triton.sass import Loop

from .cases import Case
from .work import backward_work, forward_work

RESOURCES = Path("tests", "kernels", "triton_resources.json")

PROCESSORS = 132
CLOCK = 1.755e9  # cycles a second
SCHEDULERS = 4  # of a multiprocessor; a warpgroup has a warp on each
WGMMA = 2048  # multiplications a cycle of a multiprocessor
MMA_SYNC = 0.629 * WGMMA  # Ampere's instructions on Hopper, by published microbenchmarks
SPECIAL = 16  # exponentials a cycle of a multiprocessor
CACHE_BYTES = 24  # a cycle of a multiprocessor: 5.5 TB/s from the second-level cache, assumed
MEMORY = 3.0e12  # bytes a second
WAIT, BARRIER = 30, 20  # cycles, assumed: until a product is complete, and until all warps arrive
REGISTERS, SHARED, THREADS = 65536, 227 * 1024, 2048
LOAD = 300  # cycles, assumed: until what a load reads from the second-level cache is there
SORT = 15e-6  # seconds, assumed: PyTorch's sort of the documents by their starts
LAUNCH = 1.5e-6  # seconds between kernels of one stream, assumed
LAYERS = 24  # with attention, which share the plan of a reading
# As the kernels are launched: call.py, which cannot be imported without triton.
MIN_SPLIT_KEYS = 256
_DOCUMENTS_TOGETHER = 32  # of a program of coefficients_kernel


@dataclass(frozen=True)
class Tile:
    """What one warpgroup executes for a tile.

    Attributes:
        tensor: cycles on the tensor cores.
        issue: instructions of a warp.
        special: of them, exponentials and the like.
        waits: for products.
        barriers: of the program.
        bytes: that the program reads from, or adds to, the second-level cache.
    """

    tensor: float
    issue: float
    special: float
    waits: float = 0.0
    barriers: float = 0.0
    bytes: float = 0.0

    def cycles(self, warpgroups: float, programs: float) -> float:
        """Of one tile each of so many resident programs, which have so many warpgroups together."""
        special = self.special * 32 * SCHEDULERS / SPECIAL
        busy = warpgroups * (self.tensor + max(self.issue, special))
        busy += self.waits * WAIT + self.barriers * BARRIER
        return max(busy, programs * self.bytes / CACHE_BYTES)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its tile shape, its loops, and how many programs are resident together."""

    rows: int
    keys: int
    warps: int
    registers: int
    shared: int
    instructions: int
    loops: tuple[Loop, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Kernel:
        """From a row of the table of resources."""
        shape, warps, _ = (part.split()[0] for part in row["tile"].split(", "))
        rows, keys = map(int, shape.split("x"))
        loops = tuple(Loop(*values) for values in row["loops"])
        return cls(
            rows, keys, int(warps), row["registers"], row["shared"], row["instructions"], loops
        )

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return max(
            1,
            min(
                REGISTERS // registers, SHARED // max(self.shared, 1), THREADS // (32 * self.warps)
            ),
        )

    def loop(self, function: str) -> Loop:
        """The loop in a function; of several, that without masks, which is the shortest."""
        found = [loop for loop in self.loops if loop.function == function]
        if not found:
            known = ", ".join(loop.function for loop in self.loops)
            raise ValueError(f"the kernel must have a loop in {function}, got loops in {known}")
        return min(found, key=lambda loop: loop.instructions)

    def tile(self, function: str, head_dim: int, rare: float = 1.0) -> Tile:
        """A pass of a loop, in which conditional instructions run with frequency ``rare``."""
        loop = self.loop(function)
        issue = loop.instructions - (1 - rare) * loop.conditional
        moved = 2 * self.keys * head_dim * 2
        return Tile(loop.tensor_cycles, issue, loop.mufu, loop.waits, loop.barriers, moved)

    def seconds(self, programs: int, tiles: Iterable[tuple[float, Tile]]) -> float:
        """Of so many equal programs, each of which visits so many tiles of each kind."""
        resident = min(self.resident, math.ceil(programs / PROCESSORS))
        waves = math.ceil(programs / (PROCESSORS * resident))
        warpgroups = resident * self.warps / SCHEDULERS
        outside = max(self.instructions - sum(loop.instructions for loop in self.loops), 0)
        cycles = warpgroups * outside
        cycles += sum(count * tile.cycles(warpgroups, resident) for count, tile in tiles)
        return waves * cycles / CLOCK


class Resources:
    """The kernels for Hopper of the table of resources.

    Args:
        path: of the table that ``python -m dream_kernels.triton.aot --write`` makes.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it has no loops of a kernel that is asked for.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"the table of resources must be a file, got {path}: make it with "
                "python -m dream_kernels.triton.aot --target sm_90 --write FILE"
            )
        self.path = path
        self.rows = json.loads(path.read_text(encoding="utf-8"))["kernels"]

    def has(self, head_dim: int, name: str) -> bool:
        return f"sm_90/{head_dim}/{name}" in self.rows

    def kernel(self, head_dim: int, name: str) -> Kernel:
        row = self.rows.get(f"sm_90/{head_dim}/{name}", {})
        if "loops" not in row:
            raise ValueError(f"{self.path} must have the loops of sm_90/{head_dim}/{name}")
        return Kernel.of(row)


# FlashAttention's tiles on an H100, rows by keys.
_FLASH_TILES = {64: (128, 128), 128: (128, 64)}
# Instructions of a warp for 32 logits: scale, exponential, peak, sum, half a conversion.
_SOFTMAX = 4.5
# And backward: scale, exponential, difference, product, two halves of conversions.
_SOFTMAX_BACKWARD = 5.0
_MMA_SYNC_SIZE = 16 * 8 * 16  # multiplications of an instruction of a warp
_LOADS_PER_MMA = 0.5  # of fragments from shared memory


def flash_tile(version: int, head_dim: int, backward: bool) -> tuple[int, int, Tile]:
    """Rows, keys and work of a tile of FlashAttention 2 or 3, counted from its algorithm.

    The work is of one warpgroup, were it alone to do all: the four schedulers share the warps'
    instructions. The backward adds the queries' gradient of each tile to float32 sums in memory.
    """
    rows, keys = (128, 128) if backward else _FLASH_TILES[head_dim]
    products = (5 if backward else 2) * rows * keys * head_dim
    vectors = rows * keys / 32
    issue = vectors * (_SOFTMAX_BACKWARD if backward else _SOFTMAX)
    if not backward:
        issue += rows * head_dim / 32  # the output is rescaled
    if version == 2:
        issue += products / _MMA_SYNC_SIZE * (1 + _LOADS_PER_MMA)
    tensor = products / (MMA_SYNC if version == 2 else WGMMA)
    added = rows * head_dim * 4 if backward else 0
    # Additions in the cache are not overlapped with what waits for their tile.
    tensor += added / CACHE_BYTES
    return rows, keys, Tile(tensor, issue / SCHEDULERS, vectors / SCHEDULERS)


def flash_seconds(version: int, case: Case, backward: bool) -> float:
    """Of FlashAttention without scores on a case, each query head alone, in full waves."""
    rows, keys, tile = flash_tile(version, case.head_dim, backward)
    length = case.prefix + case.local
    tiles = -(-case.rows // rows) * -(-length // keys)
    programs = case.batch * case.query_heads
    if backward:
        # Programs hold keys and walk the rows.
        return programs * tiles * tile.cycles(1, 1) / (PROCESSORS * CLOCK)
    return math.ceil(programs / PROCESSORS / 2) * 2 * tiles * tile.cycles(1, 1) / CLOCK


# Attention of 4,096 positions, not causal, TFLOP/s published for an H100 SXM by the authors of
# FlashAttention 3, who measured all of them: (peer, head size, backward), figure.
PUBLISHED = {
    ("FlashAttention 2", 64, False): 321, ("FlashAttention 2", 128, False): 368,
    ("FlashAttention 2", 64, True): 279, ("FlashAttention 2", 128, True): 310,
    ("FlashAttention 3", 64, False): 476, ("FlashAttention 3", 128, False): 638,
    ("FlashAttention 3", 64, True): 453, ("FlashAttention 3", 128, True): 542,
    ("Triton's tutorial", 64, False): 400, ("Triton's tutorial", 128, False): 389,
}  # fmt: skip


def published_rows(resources: Resources) -> Iterator[tuple[str, int, str, float, float]]:
    """Peer, head size, direction, published and predicted TFLOP/s.

    Triton's tutorial kernel is what our kernels' loop over plain keys is, so it is predicted from
    that loop, in the kernel of mode bias.
    """
    for (peer, head_dim, backward), published in PUBLISHED.items():
        if peer.startswith("Flash"):
            rows, keys, tile = flash_tile(int(peer[-1]), head_dim, backward)
            cycles = tile.cycles(1, 1)
        else:
            kernel = resources.kernel(head_dim, "forward-bias")
            rows, keys = kernel.rows * kernel.resident, kernel.keys
            tile = kernel.tile("plain_keys", head_dim)
            cycles = tile.cycles(kernel.resident * kernel.warps / SCHEDULERS, kernel.resident)
        operations = (10 if backward else 4) * rows * keys * head_dim
        predicted = operations * PROCESSORS * CLOCK / cycles / 1e12
        yield peer, head_dim, "backward" if backward else "forward", published, predicted


@dataclass(frozen=True)
class Prediction:
    """Seconds of one case.

    Attributes:
        forward: of the forward, its plan apart.
        backward: of the backward for the case's gradients, likewise.
        plan: of the work lists of all calls of a reading.
        flash: of FlashAttention 2's forward and backward without scores, by the same formula.
    """

    forward: float
    backward: float
    plan: float
    flash: float

    @property
    def total(self) -> float:
        """Of a layer, with its share of the plan."""
        return self.forward + self.backward + self.plan / LAYERS


def predict(case: Case, resources: Resources) -> Prediction:
    """The time of a case whose heads are all scored, and which has no padding."""
    ours = _Ours(case, resources)
    flash = sum(flash_seconds(2, case, backward) for backward in (False, True))
    return Prediction(ours.forward(), ours.backward(), ours.plan(), flash)


_PLAN = ("list-documents", "list-keys", "weights")


class _Ours:
    """The kernels of one case."""

    def __init__(self, case: Case, resources: Resources) -> None:
        self.case, self.resources = case, resources
        self.group = case.query_heads // case.key_heads

    def forward(self) -> float:
        seconds = self.over_rows("forward", "long_documents", "rest_keys")
        return max(seconds, forward_work(self.case).bytes / MEMORY) + LAUNCH + self.weights()

    def backward(self) -> float:
        gradients = self.case.gradients
        if "query" in gradients and self.in_one_pass:
            seconds = self.over_rows("both", "long_documents_at_once", "rest_gradients")
            seconds += self.coefficients("coefficients-before") + self.coefficients(
                "coefficients-after"
            )
            launches = 3
        else:
            seconds = self.over_rows("documents", "long_document_gradients", None)
            seconds, launches = seconds + self.coefficients(), 2
            if "query" in gradients:
                seconds += self.over_rows("query", "long_document_gradients", "rest_gradients")
                launches += 1
        seconds += self.weights()
        if {"key", "value"} & set(gradients):
            seconds += self.over_keys()
            launches += 1
        seconds = max(seconds, backward_work(self.case).bytes / MEMORY)
        return seconds + launches * LAUNCH

    @property
    def in_one_pass(self) -> bool:
        """As call.py decides, but for folded rows, which no case here has."""
        if self.case.mode == "bias" or not self.resources.has(self.case.head_dim, "both-reweight"):
            return False
        return self.splits(self.kernel("both")) == 1

    def kernel(self, name: str, split: bool = False) -> Kernel:
        mode = "" if name in (*_PLAN, "mass") else f"-{self.case.mode}"
        head_dim = 64 if name in _PLAN else self.case.head_dim  # which they do not depend on
        return self.resources.kernel(head_dim, f"{name}{mode}{'-split' if split else ''}")

    def over_rows(self, name: str, documents: str, rest: str | None) -> float:
        """A kernel whose programs hold rows and visit the documents, and the rest."""
        case, kernel = self.case, self.kernel(name)
        length = case.prefix + case.local
        splits = self.splits(kernel)
        if splits > 1:
            kernel = self.kernel(name, split=True)
        programs = self.row_blocks(kernel)
        per_document = math.ceil(case.covered / case.documents / kernel.keys)
        tiles = [
            (
                case.documents * per_document / splits,
                kernel.tile(documents, case.head_dim, rare=1 / per_document),
            )
        ]
        if rest is not None:
            outside = math.ceil((length - case.covered) / kernel.keys)
            tiles.append((outside / splits, kernel.tile(rest, case.head_dim)))
        return kernel.seconds(programs * splits, tiles)

    def splits(self, kernel: Kernel) -> int:
        """Parts that the keys of a row are cut into."""
        parts = (self.case.prefix + self.case.local) // MIN_SPLIT_KEYS
        return max(1, min(2 * PROCESSORS // self.row_blocks(kernel), parts))

    def row_blocks(self, kernel: Kernel) -> int:
        rows = self.group * self.case.rows
        return math.ceil(rows / kernel.rows) * self.case.key_heads * self.case.batch

    def over_keys(self) -> float:
        case, kernel = self.case, self.kernel("keys")
        programs = math.ceil(case.local / kernel.keys) * case.key_heads * case.batch
        tile = kernel.tile("_add_rows", case.head_dim)
        return kernel.seconds(programs, [(math.ceil(case.rows / kernel.rows) * self.group, tile)])

    def coefficients(self, name: str = "coefficients") -> float:
        kernel = self.kernel(name)
        passes = math.ceil(self.case.documents / _DOCUMENTS_TOGETHER)
        programs = math.ceil(self.case.rows / kernel.rows) * self.case.query_heads * self.case.batch
        tiles = [(passes, _small(loop, 1)) for loop in kernel.loops]
        return kernel.seconds(programs, tiles) + LAUNCH

    def plan(self) -> float:
        """The lists for each size of tiles, and the documents of the keys for their gradients."""
        backward = ["documents"]
        if "query" in self.case.gradients:
            backward = ["both"] if self.in_one_pass else ["documents", "query"]
        widths = {self.kernel(name).keys for name in ("forward", *backward)}
        lists = len(widths) + bool({"key", "value"} & set(self.case.gradients))
        return SORT + len(widths) * self.list_documents() + lists * self.list_keys()

    def list_documents(self) -> float:
        """Programs that scan the documents of one batch element each."""
        kernel = self.kernel("list-documents")
        passes = math.ceil(self.case.documents / kernel.rows)
        return kernel.seconds(self.case.batch, [(passes, _small(kernel.loops[0], 2))]) + LAUNCH

    def list_keys(self) -> float:
        """Blocks of positions, which bisect the documents: the ends of the block, keys, tiles."""
        case, kernel = self.case, self.kernel("list-keys")
        programs = math.ceil((case.prefix + case.local) / kernel.rows) * case.batch
        *ends_and_tiles, keys = sorted(kernel.loops, key=lambda loop: loop.instructions)
        within = math.ceil(kernel.rows * case.documents / case.covered) + 1
        tiles = [(case.documents.bit_length(), _small(loop, 1)) for loop in ends_and_tiles]
        tiles.append((within.bit_length(), _small(keys, 1)))
        return kernel.seconds(programs, tiles) + LAUNCH

    def weights(self) -> float:
        case, kernel = self.case, self.kernel("weights")
        passes = math.ceil(case.documents / kernel.rows)
        return kernel.seconds(case.batch, [(passes, _small(loop, 1)) for loop in kernel.loops])


def _small(loop: Loop, loads: int) -> Tile:
    """A pass of a loop without products, with so many loads in a row that are waited for."""
    return Tile(0, loop.instructions, loop.mufu, loads * LOAD / WAIT, loop.barriers)


def published_table(resources: Resources) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison with published figures."""
    rows = [
        [
            peer, str(head_dim), direction, f"{published:.0f}", f"{predicted:.0f}",
            f"{100 * (predicted / published - 1):+.0f} %",
        ]
        for peer, head_dim, direction, published, predicted in published_rows(resources)
    ]  # fmt: skip
    return ["TFLOP/s on an H100", "head size", "", "published", "predicted", "error"], rows


def case_table(resources: Resources, cases: Iterable[Case]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the predictions for cases of ours, in microseconds."""
    rows = []
    for case in cases:
        found = predict(case, resources)
        times = (found.forward, found.backward, found.plan, found.flash)
        gradients = "all" if len(case.gradients) > 2 else ", ".join(case.gradients)
        rows.append(
            [case.name, gradients, *(f"{1e6 * x:,.0f}" for x in times),
             f"{found.total / found.flash:.2f}"]
        )  # fmt: skip
    return [
        "predicted, µs", "gradients", "forward", "backward", "plan",
        "FA 2, both", "ratio",
    ], rows  # fmt: skip
