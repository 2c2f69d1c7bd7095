"""Tile shapes: which are worth trying for each kernel, family of devices and head size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How one kernel is built.

    Attributes:
        rows: rows of a tile.
        keys: keys of a tile.
        warps: warps of a program.
        stages: depth of the software pipeline over tiles.
        slot: documents of up to this many keys share a tile, ``keys / slot`` to a tile.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    slot: int = 16


# The interpreter gets tiles so small that short tests take every path.
INTERPRETER = Config(rows=64, keys=16, warps=4, stages=1, slot=4)

# (kernel, family, padded head size, bytes of an element): (rows, keys, warps, stages), ...
#
# The first of a list is the default, the others are timed against it. A family that has no entry
# takes Ampere's; a folded or split kernel that has none takes that of the whole rows.
#
# - Two accumulators of a row's width in registers bound rows * head size; query, keys and values
#   in shared memory bound keys * stages to what a device of the family gives a block: 99 KB on
#   sm_86 and sm_89, the least. The defaults spill no register at head sizes 64 and 128 in 16 bits,
#   and at 64 in exact float32, whose products are made without tensor cores; at 128 those do.
# - Hopper: wgmma reads its operands from shared memory, which leaves registers for taller tiles.
# - Blackwell: tcgen05 accumulates in tensor memory, from which tiles are read into registers whole.
# - Folding and splitting take registers, hence smaller tiles.
# - "both" is "documents" and "query" in one pass, for whole rows. It has no entry, so that the two
#   remain, at head size 256, at 128 in float32, and on Blackwell, where triton's pipeliner crashes.
TILES: dict[tuple[str, str, int, int], tuple[tuple[int, int, int, int], ...]] = {
    ("forward", "ampere", 64, 2): ((128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    ("forward", "hopper", 64, 2): ((128, 64, 8, 3), (64, 64, 4, 3)),
    ("forward", "blackwell", 64, 2): ((64, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    ("forward", "ampere", 128, 2): ((64, 32, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2)),
    ("forward", "hopper", 128, 2): ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 3)),
    ("forward", "blackwell", 128, 2): ((64, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 3)),
    ("forward", "ampere", 256, 2): ((64, 32, 8, 2), (32, 32, 4, 2)),
    ("forward", "ampere", 64, 4): ((32, 16, 4, 2), (32, 32, 4, 2)),
    ("forward", "ampere", 128, 4): ((32, 32, 4, 2), (32, 16, 4, 2)),
    ("forward", "ampere", 256, 4): ((16, 16, 4, 2),),
    ("forward-fold", "hopper", 64, 2): ((128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    ("forward-fold", "blackwell", 64, 2): ((64, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3)),
    ("forward-fold", "hopper", 128, 2): ((64, 32, 8, 2), (128, 32, 8, 2)),
    ("forward-fold", "blackwell", 128, 2): ((32, 32, 8, 2), (64, 32, 8, 2)),
    ("forward-split", "ampere", 64, 2): ((64, 32, 8, 3), (128, 32, 8, 3)),
    ("forward-split", "ampere", 128, 2): ((32, 64, 8, 2), (64, 32, 8, 2)),
    ("forward-split", "hopper", 64, 2): ((128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    ("forward-split", "blackwell", 64, 2): ((64, 64, 8, 2), (128, 32, 8, 2)),
    ("forward-split", "hopper", 128, 2): ((64, 64, 8, 1), (128, 32, 8, 2)),
    ("forward-split", "blackwell", 128, 2): ((32, 32, 8, 2), (64, 32, 8, 2)),
    ("documents", "ampere", 64, 2): ((128, 64, 8, 2), (64, 64, 4, 3)),
    ("documents", "ampere", 128, 2): ((64, 64, 4, 2), (128, 32, 8, 2)),
    ("documents", "blackwell", 128, 2): ((128, 32, 8, 2), (64, 64, 4, 2)),
    ("documents", "ampere", 256, 2): ((64, 32, 8, 1), (32, 32, 4, 1)),
    ("documents", "ampere", 64, 4): ((32, 32, 4, 2), (32, 16, 4, 2)),
    ("documents", "ampere", 128, 4): ((32, 16, 4, 2), (16, 16, 4, 2)),
    ("documents", "ampere", 256, 4): ((16, 16, 4, 1),),
    ("documents-fold", "blackwell", 128, 2): ((64, 64, 4, 2), (128, 32, 8, 2)),
    ("documents-split", "blackwell", 64, 2): ((64, 64, 4, 3), (128, 64, 8, 2)),
    ("documents-split", "blackwell", 128, 2): ((64, 64, 4, 2), (128, 32, 8, 2)),
    ("query", "ampere", 64, 2): ((128, 32, 8, 2), (64, 64, 4, 2)),
    ("query", "hopper", 64, 2): ((128, 64, 8, 2), (64, 64, 4, 2)),
    ("query", "blackwell", 64, 2): ((128, 64, 8, 2), (64, 64, 4, 2)),
    ("query", "ampere", 128, 2): ((64, 32, 4, 2), (64, 64, 8, 1)),
    ("query", "hopper", 128, 2): ((128, 32, 8, 2), (64, 64, 8, 2)),
    ("query", "blackwell", 128, 2): ((128, 32, 8, 2), (64, 64, 8, 2)),
    ("query", "ampere", 256, 2): ((64, 32, 8, 1), (32, 32, 4, 1)),
    ("query", "ampere", 64, 4): ((32, 16, 4, 1), (16, 16, 4, 2)),
    ("query-fold", "ampere", 64, 4): ((32, 16, 4, 2), (16, 16, 4, 2)),
    ("query-split", "ampere", 64, 4): ((16, 16, 4, 2), (32, 16, 4, 1)),
    ("query", "ampere", 128, 4): ((32, 16, 4, 2), (16, 16, 4, 2)),
    ("query", "ampere", 256, 4): ((16, 16, 4, 1),),
    ("query-fold", "blackwell", 64, 2): ((128, 32, 8, 2), (64, 64, 8, 2)),
    ("query-fold", "ampere", 128, 2): ((64, 32, 8, 2), (64, 64, 8, 1)),
    ("query-fold", "blackwell", 128, 2): ((32, 32, 8, 2), (64, 32, 8, 2)),
    ("both", "ampere", 64, 2): ((128, 32, 8, 2), (64, 32, 4, 2)),
    ("both", "hopper", 64, 2): ((128, 64, 8, 2), (128, 32, 8, 2)),
    ("both", "ampere", 64, 4): ((32, 16, 4, 2), (16, 16, 4, 2)),
    ("both", "hopper", 64, 4): ((32, 16, 4, 2), (16, 16, 4, 2)),
    ("both", "ampere", 128, 2): ((64, 32, 8, 2), (32, 32, 4, 2)),
    ("both", "hopper", 128, 2): ((128, 32, 8, 2), (128, 16, 8, 2)),
    ("keys", "ampere", 64, 2): ((32, 64, 8, 1), (32, 64, 4, 2), (64, 64, 8, 2)),
    ("keys", "hopper", 64, 2): ((32, 64, 8, 2),),
    ("keys", "blackwell", 64, 2): ((32, 64, 8, 2), (64, 64, 8, 2)),
    ("keys", "ampere", 128, 2): ((32, 64, 8, 1), (32, 32, 4, 2)),
    ("keys", "hopper", 128, 2): ((16, 64, 8, 2), (32, 64, 8, 1)),
    ("keys", "blackwell", 128, 2): ((32, 64, 8, 1), (16, 64, 8, 2)),
    ("keys", "ampere", 256, 2): ((32, 32, 8, 1), (32, 64, 8, 1)),
    ("keys", "hopper", 256, 2): ((32, 64, 8, 1),),
    ("keys", "blackwell", 256, 2): ((32, 64, 8, 1),),
    ("keys", "ampere", 64, 4): ((32, 32, 4, 1), (16, 32, 4, 2)),
    ("keys", "ampere", 128, 4): ((16, 32, 4, 1), (16, 16, 4, 1)),
    ("keys", "ampere", 256, 4): ((16, 16, 4, 1),),
    ("mass", "ampere", 64, 2): ((128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    ("mass", "ampere", 128, 2): ((64, 32, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2)),
    ("mass", "ampere", 256, 2): ((64, 32, 8, 2), (32, 32, 4, 2)),
    ("mass", "ampere", 64, 4): ((64, 32, 4, 2), (32, 32, 4, 2)),
    ("mass", "ampere", 128, 4): ((32, 32, 4, 2), (32, 16, 4, 2)),
    ("mass", "ampere", 256, 4): ((16, 16, 4, 2),),
}


def family_of(capability: int) -> str:
    """The family of a device by its major compute capability, 0 for an AMD device.

    12.x, consumer Blackwell, has neither wgmma nor tcgen05, and 99 KB of shared memory.
    """
    return {9: "hopper", 10: "blackwell"}.get(capability, "ampere")


def padded_head(head_dim: int) -> int:
    """The power of two that a head is padded to in registers, at least what a dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def in_one_pass(family: str, head_dim: int, itemsize: int) -> bool:
    """Whether whole rows have a tile shape for "both"."""
    return ("both", family, *_size(head_dim, itemsize)) in TILES


def _size(head_dim: int, itemsize: int) -> tuple[int, int]:
    return max(64, padded_head(head_dim)), itemsize


def listed(kernel: str, family: str, head_dim: int, itemsize: int) -> tuple[Config, ...]:
    """The entry of :data:`TILES` that a kernel of a head size takes."""
    size = _size(head_dim, itemsize)
    for of_family in (family, "ampere"):
        for form in (kernel, kernel.partition("-")[0]):
            shapes = TILES.get((form, of_family, *size))
            if shapes is not None:
                return tuple(Config(*shape) for shape in shapes)
    raise KeyError(f"no tile shapes for {kernel} at head size {head_dim}, {itemsize} bytes")
