"""What a kernel's machine code executes on Hopper: its loops, their instructions, their waits.

A product is asynchronous there: ``HGMMA`` starts it and ``WARPGROUP.DEPBAR`` waits for it, once for
many if the compiler sees that nothing reads an accumulator in between. Where it does not, ptxas
*serialises*: it waits after each product, says so in a note (C7514, C7515 and relatives) that
Triton drops, and the tensor cores idle between products. So the waits are counted.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)(.*)$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"`\((\.L_x_\d+)\)")
_PLACE = re.compile(r'File "[^"]*dream_kernels/triton/(\w+\.py)", line (\d+)')
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x(?:8|16|32)\b")
# A loop is of the innermost function that most of its instructions come from; the others were
# moved here from elsewhere.
_MOST = 0.9
SERIALISED = re.compile(r"\((C\d+)\)[^\n]*wgmma\.mma_async instructions are serialized")


@dataclass(frozen=True)
class Loop:
    """An innermost loop, in warp instructions of one pass.

    Attributes:
        function: that the loop is in, by the lines of its instructions.
        instructions: all.
        conditional: those that a branch inside the loop may skip.
        hgmma: matrix products.
        tensor_cycles: that they occupy the tensor cores of a multiprocessor for.
        waits: for them.
        mufu: exponentials, logarithms, reciprocals.
        barriers: of the program.
        loads: from global memory.
        shared: to and from shared memory.
    """

    function: str
    instructions: int
    conditional: int
    hgmma: int
    tensor_cycles: int
    waits: int
    mufu: int
    barriers: int
    loads: int
    shared: int


@dataclass
class _Instruction:
    name: str
    operands: str
    functions: tuple[str, ...] = ()


@dataclass
class _Code:
    instructions: list[_Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def branches(self) -> Iterator[tuple[int, int]]:
        """Where each branch is, and where it leads."""
        for at, instruction in enumerate(self.instructions):
            target = _BRANCH.search(instruction.operands)
            if instruction.name == "BRA" and target is not None:
                yield at, self.labels[target[1]]


def loops(sass: str) -> list[Loop]:
    """The innermost loops of a kernel, in the order of its code.

    Args:
        sass: what ``nvdisasm -c -gi`` prints.
    """
    code = _parse(sass)
    # The loop after the kernel's end, a branch to itself, is padding.
    regions = sorted({(to, at) for at, to in code.branches() if to < at})
    innermost = [
        (first, last)
        for first, last in regions
        if not any(
            first <= other[0] and other[1] <= last and other != (first, last) for other in regions
        )
    ]
    return [_loop(code, first, last) for first, last in innermost]


def _parse(sass: str) -> _Code:
    code, fresh = _Code(), False
    functions: tuple[str, ...] = ()
    for line in sass.splitlines():
        if "//## File" in line:
            place = _PLACE.search(line)
            own = () if place is None else (_function_at(place[1], int(place[2])),)
            functions, fresh = (functions if fresh else ()) + own, True
        elif label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            code.instructions.append(_Instruction(found[2], found[3], functions))
            fresh = False
    return code


@cache
def _function_at(file: str, line: int) -> str:
    """The function of the kernels' sources that a line is in."""
    for name, first, last in _functions(file):
        if first <= line <= last:
            return name
    return ""


@cache
def _functions(file: str) -> Sequence[tuple[str, int, int]]:
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return [
        (node.name, node.lineno, node.end_lineno or node.lineno)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    ]


def _loop(code: _Code, first: int, last: int) -> Loop:
    body = code.instructions[first : last + 1]
    skipped: set[int] = set()
    for at, to in code.branches():
        if first <= at < to <= last:
            skipped.update(range(at + 1, to))
    names = [instruction.name for instruction in body]
    widths = [int(found[1]) for name in names if (found := _HGMMA.match(name))]
    hgmma = len([name for name in names if name.startswith("HGMMA")])
    return Loop(
        function=_owner(body),
        instructions=len(body),
        conditional=len(skipped),
        hgmma=hgmma,
        # 64 rows by N by 16 of two bytes, at 2,048 multiplications a cycle.
        tensor_cycles=sum(widths) // 2,
        waits=_count(names, "WARPGROUP.DEPBAR"),
        mufu=_count(names, "MUFU"),
        barriers=_count(names, "BAR."),
        loads=_count(names, "LDG"),
        shared=_count(names, "LDS", "STS"),
    )


def _count(names: Sequence[str], *beginnings: str) -> int:
    return sum(name.startswith(beginnings) and not name.startswith("LDGDEPBAR") for name in names)


def _owner(body: Sequence[_Instruction]) -> str:
    """The innermost function that most of the instructions are in."""
    located = [instruction.functions for instruction in body if instruction.functions]
    counts = Counter(name for functions in located for name in set(functions) if name)
    common = {name for name, count in counts.items() if count >= _MOST * len(located)}
    depth: Counter[str] = Counter()
    for functions in located:
        for place, name in enumerate(reversed(functions)):
            if name in common:
                depth[name] = max(depth[name], place)
    return max(common, key=lambda name: (depth[name], name), default="")


def serialisation(log: str) -> list[str]:
    """The codes of ptxas's notes that products are serialised."""
    return sorted(set(SERIALISED.findall(log)))


def count_instructions(sass: str) -> int:
    """The instructions of a kernel's code, in loops and out of them."""
    return len(_parse(sass).instructions)
