"""Compile every kernel ahead of time, without the device, and report the resources it needs.

``python -m dream_kernels.triton.aot`` prints the table of registers, shared memory, spills and
tensor-core instructions, and on Hopper what each loop executes; ``--write FILE`` saves the table
that the tests compare the kernels with. Needs triton and the tools in its wheel, no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dream_kernels.files import is_stream, write_text
from dream_kernels.triton.call import OPTIONS, unit
from dream_kernels.triton.coefficients import coefficients_kernel
from dream_kernels.triton.combine import combine_kernel, join_kernel
from dream_kernels.triton.device import triton_version
from dream_kernels.triton.forward import forward_kernel
from dream_kernels.triton.keys import keys_kernel
from dream_kernels.triton.mass import mass_kernel
from dream_kernels.triton.plan import LISTED_DOCUMENTS, LISTED_KEYS, LISTED_TILES
from dream_kernels.triton.rows import rows_kernel
from dream_kernels.triton.sass import Loop, count_instructions, loops, serialisation
from dream_kernels.triton.tiles import Config, family_of, in_one_pass, padded_head
from dream_kernels.triton.tuning import candidates
from dream_kernels.triton.work_list import (
    list_documents_kernel,
    list_keys_kernel,
    weights_kernel,
)

HEAD_DIMS = (64, 80, 96, 128, 256)
# NVIDIA: compute capability, and the shared memory that a block may have, in KB.
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in SHARED_KB},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    **dict.fromkeys(("q", "k", "v", "pk", "pv", "o", "o_part", "do"), "data"),
    **dict.fromkeys(("dq", "dk", "dv"), "data"),
    **dict.fromkeys(("table", "n_scored", "tiles", "shorts", "rest", "segment", "counts"), "*i32"),
    "places": "*i32", "order": "*i64",
    **dict.fromkeys(("weights", "state", "part_o", "part_lse", "columns", "scores"), "*fp32"),
    **dict.fromkeys(("documents", "parts", "partial", "sinks"), "*fp32"),
    "spans": "*i64", "positions": "*i64", "mask": "*u8", "scored": "*i32", "cap": "fp32",
    "scale": "fp32", "document_mass": "fp32", "dq_scale": "fp32", "dk_scale": "fp32",
}  # fmt: skip
_DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_TENSOR_CORES = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with its options."""

    name: str
    kernel: Any
    config: Config
    flags: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: per thread.
        spills: instructions that move registers to or from local memory.
        shared: bytes of shared memory of a program.
        tensor_cores: matrix instructions in the code, and which.
        instructions: in the code; on Hopper alone, as all that follows.
        serialised: what ptxas notes if it makes each product wait, see ``sass.py``.
        loops: the innermost ones.
    """

    registers: int
    spills: int
    shared: int
    tensor_cores: dict[str, int]
    instructions: int | None = None
    serialised: list[str] | None = None
    loops: list[Loop] | None = None

    def record(self) -> dict[str, Any]:
        """As JSON; a loop is a list of its fields, which the table names once."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.loops is not None:
            row["loops"] = [list(astuple(loop)) for loop in self.loops]
        return {name: value for name, value in row.items() if value is not None}


def variants(
    head_dim: int,
    family: str,
    dtype: torch.dtype = torch.bfloat16,
    rare: bool = False,
    every_tile: bool = False,
) -> Iterator[Variant]:
    """Every kernel in the form of the main case, or with all the ``rare`` options instead.

    The main case is a causal reader with a prefix, without padding, whose heads share the scores.
    Kernels are built with the first tile shape of their list, and with ``every_tile`` also with the
    others, whose names end in theirs.
    """
    base: dict[str, Any] = {"D": head_dim, "BD": padded_head(head_dim)}
    shape = {**base, "CAUSAL": not rare, "HAS_MASK": rare, "NEGATE": rare, "IP": "ieee"}
    reweight: dict[str, Any] = {"PER_HEAD": rare, "BIAS": False, "FIXED": rare}
    bias = {**reweight, "BIAS": True, "FIXED": False}

    def in_tiles(
        name: str, kernel: Any, flags: dict[str, Any], listed: str = ""
    ) -> Iterator[Variant]:
        shapes = candidates(listed or name, head_dim, dtype, rows=1 << 20, family=family)
        for i, config in enumerate(shapes if every_tile else shapes[:1]):
            yield Variant(name + (f":{describe(config)}" if i else ""), kernel, config, flags)

    for mode, flags in (("reweight", reweight), ("bias", bias)):
        for form in ("", "-fold", "-split"):
            folds = form == "-fold"  # which needs a prefix
            memory = {"HAS_PREFIX": folds or not rare, "FOLD": folds, "SPLIT": form == "-split"}
            yield from in_tiles(
                f"forward-{mode}{form}", forward_kernel,
                {**shape, **memory, **flags, "KEEP": mode == "reweight"},
                f"forward{form}",
            )  # fmt: skip
            query = ("query", mode == "bias", True)
            if mode == "reweight" and not form and in_one_pass(family, head_dim, dtype.itemsize):
                query = ("both", True, True)
            for name, documents, with_query in (("documents", True, False), query):
                yield from in_tiles(
                    f"{name}-{mode}{form}", rows_kernel,
                    {**shape, **memory, **flags, "DOCUMENTS": documents, "DQ": with_query},
                    f"{name}{form}",
                )  # fmt: skip
        yield from in_tiles(
            f"keys-{mode}", keys_kernel,
            {**shape, "PER_HEAD": rare, "BIAS": mode == "bias", "SHARED": rare, "DK": True,
             "DV": True},
            "keys",
        )  # fmt: skip
        yield Variant(
            f"combine-{mode}", combine_kernel, Config(16, 64, 8, 1),
            {**base, **flags, "KEEP": mode == "reweight"},
        )  # fmt: skip
        by_document = mode == "reweight"
        # All, or for one pass what is needed before it and what follows from it.
        parts = (("", by_document, True), ("-before", False, True), ("-after", True, False))
        for part, documents, fill in parts if by_document else parts[:1]:
            yield Variant(
                f"coefficients{part}-{mode}", coefficients_kernel, Config(32, 64, 8, 1),
                {**base, **flags, "BC": 32, "DOCUMENTS": documents, "SCORES": documents,
                 "LOGITS": fill, "FILL": fill},
            )  # fmt: skip
    yield from in_tiles("mass", mass_kernel, {**shape, "HAS_PREFIX": not rare})
    if head_dim == HEAD_DIMS[0]:  # these do not depend on it
        yield Variant("join", join_kernel, Config(16, 64, 1, 1), {})
        yield Variant(
            "list-documents", list_documents_kernel, Config(LISTED_DOCUMENTS, 64, 4, 1),
            {"BC": LISTED_DOCUMENTS, "CAUSAL": not rare},
        )  # fmt: skip
        yield Variant(
            "list-keys", list_keys_kernel, Config(LISTED_KEYS, 64, 4, 1),
            {"BX": LISTED_KEYS, "BT": LISTED_TILES, "TILES": True, "REST": True, "SEGMENT": rare,
             "HAS_MASK": rare},
        )  # fmt: skip
        yield Variant("weights", weights_kernel, Config(64, 64, 4, 1), {"BW": 64, "BIAS": rare})


def describe(config: Config) -> str:
    """A tile shape: rows, keys, warps, stages."""
    return f"{config.rows}x{config.keys}-{config.warps}-{config.stages}"


def family_of_target(target: str) -> str:
    """The family of tile shapes that a target, such as ``sm_90``, takes."""
    return family_of(int(target[3:]) // 10 if target[:3] == "sm_" else 0)


def compile_variant(
    variant: Variant, target: GPUTarget, dtype: torch.dtype, options: Collection[str] = ()
) -> Any:
    """Compile as the launcher would for aligned, contiguous tensors, with some of ``OPTIONS``.

    Their strides are multiples of 16 only if the head size is.
    """
    config, head_dim = variant.config, variant.flags.get("D", 16)
    known = {
        **variant.flags, "BM": config.rows, "BN": config.keys, "SLOT": config.slot,
        "UNIT": unit(head_dim, dtype.itemsize),
    }  # fmt: skip
    kernel = variant.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[int] = []
    for i, name in enumerate(kernel.arg_names):
        parameter = kernel.params[i]
        if parameter.is_constexpr:
            constants[name], signature[name] = known[name], "constexpr"
        elif (name.startswith("s_") and name.endswith("d")) or name == "s_sc":
            constants[name], signature[name] = 1, "constexpr"
        elif name in OPTIONS and name not in options:
            constants[name], signature[name] = None, "constexpr"
        else:
            kind = _POINTERS.get(name, "i32")
            signature[name] = _DTYPES[dtype] if kind == "data" else kind
            if signature[name][0] == "*" or (
                name.startswith("s_") and not parameter.do_not_specialize and head_dim % 16 == 0
            ):
                aligned.append(i)
    source = ASTSource(kernel, *_source_arguments(signature, constants, aligned))
    built = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=built)


def _source_arguments(
    signature: dict[str, str], constants: dict[str, Any], aligned: list[int]
) -> tuple[Any, ...]:
    """The arguments of ASTSource, whose form changed in triton 3.3."""
    if triton_version() >= (3, 3):
        return signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    from triton.backends.compiler import AttrsDescriptor

    kept = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    attributes = AttrsDescriptor.from_dict(
        {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
    )
    return kept, constants, attributes


def measure(compiled: Any) -> Resources:
    """Read a compiled kernel's resources from its machine code."""
    asm = compiled.asm
    text = asm.get("ptx") or asm["amdgcn"]
    kinds: dict[str, int] = {}
    for match in _TENSOR_CORES.findall(text):
        kinds[match] = kinds.get(match, 0) + 1
    shared = compiled.metadata.shared
    if "cubin" not in asm:
        numbers = re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)
        found = {name: int(number) for name, number in numbers}
        return Resources(found["vgpr_count"], found["vgpr_spill_count"], shared, kinds)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-gi", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    resources = Resources(int(registers[1]), spills, shared, kinds)
    if compiled.metadata.target.arch != 90:
        return resources
    return replace(
        resources,
        instructions=count_instructions(sass),
        serialised=serialisation(_ptxas_log(text)) if "wgmma" in text else [],
        loops=loops(sass),
    )


def _ptxas_log(ptx: str) -> str:
    """What ptxas says of the code: Triton does not keep it."""
    target = re.search(r"^\.target (\S+)", ptx, re.M)
    assert target is not None, ptx[:200]
    failure: subprocess.CalledProcessError | None = None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        # A wheel has one or two of these, and compiles with the one that knows the code's version.
        for name in ("ptxas", "ptxas-blackwell"):
            try:
                return _tool(
                    name, "-v", "-lineinfo", f"--gpu-name={target[1]}", str(source),
                    "-o", str(Path(folder, "kernel.cubin")), stderr=subprocess.STDOUT,
                )  # fmt: skip
            except subprocess.CalledProcessError as error:  # noqa: PERF203
                failure = error
    assert failure is not None
    raise failure


@cache
def _tool_path(name: str) -> Path:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"triton {triton.__version__} contains no {name} ({path})")
    return path


def _tool(name: str, *arguments: str, stderr: int = subprocess.PIPE) -> str:
    done = subprocess.run(
        [_tool_path(name), *arguments],
        stdout=subprocess.PIPE, stderr=stderr, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def compiled_rows(
    targets: Iterable[str],
    head_dims: Iterable[int],
    names: Collection[str] = (),
    dtype: torch.dtype = torch.bfloat16,
    rare: bool = False,
    options: Collection[str] = (),
    every_tile: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``"target/head size/kernel"`` and resources, for all kernels or those in ``names``.

    ``every_tile`` has an effect on Hopper alone, where a tile shape decides whether ptxas
    serialises.
    """
    for target, head_dim in itertools.product(targets, head_dims):
        family = family_of_target(target)
        for variant in variants(head_dim, family, dtype, rare, every_tile and family == "hopper"):
            if names and not {variant.name, variant.name.partition(":")[0]} & set(names):
                continue
            compiled = compile_variant(variant, TARGETS[target], dtype, options)
            config = variant.config
            tile = f"{config.rows}x{config.keys}, {config.warps} warps, {config.stages} stages"
            resources = measure(compiled).record()
            yield f"{target}/{head_dim}/{variant.name}", {"tile": tile, **resources}


def write_table(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Put ``rows`` into the JSON table at ``path``, one row to a line."""
    if path.exists():
        before = json.loads(path.read_text())
        if before["triton"] == triton.__version__:
            rows = {**before["kernels"], **rows}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    version = json.dumps(triton.__version__)
    loop = json.dumps([f.name for f in fields(Loop)])
    whole = f'{{\n "triton": {version},\n "loop": {loop},\n "kernels": {{\n{lines}\n }}\n}}\n'
    write_text(path, whole)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_kernels.triton.aot", description=__doc__)
    parser.add_argument("--target", action="append", choices=tuple(TARGETS))
    parser.add_argument("--head-dim", action="append", type=int)
    parser.add_argument("--kernel", action="append", default=[], help="only this one")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--rare", action="store_true",
        help="compile with the options that the table leaves out: padding, no causal mask, "
        "scores per head, fixed mass, a negative scale, gradients of a shared prefix",
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], choices=OPTIONS,
        help="compile for calls that have this: 'cap' is the soft cap",
    )  # fmt: skip
    parser.add_argument(
        "--first-tile", action="store_true",
        help="on Hopper compile the first tile shape of each kernel alone, too",
    )  # fmt: skip
    parser.add_argument(
        "--write", type=Path,
        help="write the table to this file, as JSON; its rows from the same triton that were not "
        "compiled now are kept",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.write is not None and is_stream(options.write):
        parser.error(f"--write: expected a file, whose rows are kept, got {options.write}")
    found = compiled_rows(
        options.target or ("sm_80", "sm_90", "sm_100"),
        options.head_dim or HEAD_DIMS,
        options.kernel,
        getattr(torch, options.dtype),
        options.rare,
        options.option,
        not options.first_tile,
    )
    for key, row in found:
        cores = ", ".join(f"{count} {kind}" for kind, count in row["tensor_cores"].items()) or "-"
        print(
            f"{key:<34} {row['tile']:<28} {row['registers']:>4} registers {row['spills']:>5} spills"
            f" {row['shared'] / 1024:>7.1f} KB  {cores}",
            *row.get("serialised", ()),
            flush=True,
        )
        for loop in (Loop(*values) for values in row.get("loops", ())):
            print(
                f"{'':<34} {loop.function:<28} {loop.instructions:>4} instructions, "
                f"{loop.waits} waits for {loop.hgmma} HGMMA, {loop.mufu} MUFU, "
                f"{loop.barriers} barriers, {loop.loads} loads"
            )
        if options.write is not None:
            write_table(options.write, {key: row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
