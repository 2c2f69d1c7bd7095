"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, tensor instructions.

``python -m helpers.cuda_resources`` in ``tests/`` renews ``kernels/cuda_resources.json``. It needs
nvcc, and cuobjdump, which comes with triton; no GPU. It compiles for minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from dream_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "kernels" / "cuda_resources.json"
PARTS = ("common", "bf16_64", "bf16_128", "f16_64", "f16_128")
ARCHS = ("80", "86", "89", "90", "100", "120")
_COUNTED = {"tensor": r"\bHMMA\b", "spills": r"\b(LDL|STL)\b", "barriers": r"\bBAR\.SYNC"}


def cuobjdump() -> str | None:
    """The program, from CUDA or from triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.is_file() else None


def _listing(what: str, binary: Path) -> list[tuple[str, str]]:
    """Pairs of ``sm_80/kernel`` and what cuobjdump prints of it."""
    program = cuobjdump()
    assert program is not None
    done = subprocess.run([program, what, binary], capture_output=True, text=True, check=True)
    found = []
    for of_arch in re.split(r"^arch = ", done.stdout, flags=re.MULTILINE)[1:]:
        arch = of_arch.split(maxsplit=1)[0]
        pieces = re.split(r"^\s*Function\s*:?\s*dream_(\w+):?\s*$", of_arch, flags=re.MULTILINE)
        found += [(f"{arch}/{n}", text) for n, text in zip(pieces[1::2], pieces[2::2])]
    return found


def resources(binary: bytes) -> dict[str, dict[str, int]]:
    """The resources of every kernel of a fat binary for every architecture in it."""
    shared = {name.removeprefix("dream_"): s for name, _, _, s in _native.cuda_kernels()}
    rows: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.fatbin")
        path.write_bytes(binary)
        for name, text in _listing("-res-usage", path):
            registers = re.search(r"REG:(\d+)", text)
            assert registers is not None, text
            rows[name] = {"registers": int(registers[1]), "shared": shared[name.split("/")[1]]}
        for name, text in _listing("-sass", path):
            rows[name] |= {what: len(re.findall(p, text)) for what, p in _COUNTED.items()}
    return rows


def compile_part(part: str) -> bytes:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.fatbin")
        source = ROOT / "csrc" / "cuda" / "kernels.cu"
        command = ["nvcc", "-std=c++17", "-O3", "-fatbin", *codes, f"-DDREAM_PART={part}", source]
        subprocess.run([*command, "-o", target], check=True)
        return target.read_bytes()


def write() -> None:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+(\.\d+)+)", version.stdout)
    assert found is not None, version.stdout
    kernels: dict[str, Any] = {}
    for part in PARTS:
        kernels |= resources(compile_part(part))
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels)
    )
    RECORD.write_text(f'{{"nvcc": "{found[1]}", "kernels": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    write()
