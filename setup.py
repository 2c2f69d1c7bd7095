"""Builds the native extension with ninja. Everything else about the package is in pyproject.toml.

Environment: CXX, CXXFLAGS, CPPFLAGS, LDFLAGS, ARCHFLAGS as usual; MAX_JOBS limits the compilers
that run at once. DREAM_KERNELS_CUDA=0 leaves the kernels for NVIDIA GPUs out and 1 demands them,
with nvcc from PyPI where there is none; otherwise they are built where nvcc is found.
DREAM_KERNELS_CUDA_ARCHS names compute capabilities, such as "80;90".
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*.cpp"))
HEADERS = sorted(
    str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".h", ".cu", ".S")
)

# Contraction lets the portable C++ use fused multiply-adds where the instruction set has them.
FLAGS = shlex.split(
    "-std=c++17 -O3 -DNDEBUG -fPIC -pthread -ffp-contract=fast "
    "-fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra -Wno-psabi"
)

# The kernel is compiled once per instruction set and chosen at run time.
KERNEL = "csrc/cpu/kernel/kernel.cpp"
X86_INSTRUCTION_SETS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl",
    "avx512_bf16": "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512bf16",
}

CUDA_BINARIES = "csrc/cuda/binaries.cpp"
# What kernels.cu is compiled for in one piece, so that several compilers share the work.
CUDA_PARTS = ("common", "bf16_64", "bf16_128", "f16_64", "f16_128")
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# The oldest of CUDA 13: binaries run with its drivers and all later ones. The packages do not say
# that their versions must be the same.
NVCC_PACKAGES = [
    f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime")
]


def stop(message: str) -> NoReturn:
    # Not an exception with a traceback: whoever sees it wants to install.
    raise SystemExit(f"error: {message}")


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def find_compiler() -> list[str]:
    named = words("CXX")
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    names = ", ".join(f'"{c[0]}"' for c in candidates)
    stop(
        f"dream-kernels needs a C++17 compiler, and {names} was not found; install g++ "
        "(Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: "
        "xcode-select --install) or set CXX"
    )


def probe(compiler: list[str], program: str, flags: list[str]) -> str | None:
    """Return why the compiler refuses a program, or None when it takes it."""
    command = [*compiler, *words("CXXFLAGS"), *flags, "-std=c++17", "-fsyntax-only", "-x", "c++"]
    result = subprocess.run(
        [*command, "-"], input=program, capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return None
    return next((x for x in result.stderr.splitlines() if "error" in x), "it gave no reason")


def check_compiler(compiler: list[str]) -> None:
    program = "#include <optional>\n#include <thread>\nint main() { return 0; }\n"
    reason = probe(compiler, program, [])
    if reason is not None:
        stop(f"dream-kernels needs a C++17 compiler, and {shlex.join(compiler)} is none: {reason}")


def instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
    """Return the compiler's flags for each instruction set that it knows."""
    if not targets_x86():
        return {"portable": []}
    program = "#include <immintrin.h>\nint main() { return 0; }\n"
    sets = {name: flags.split() for name, flags in X86_INSTRUCTION_SETS.items()}
    return {n: f for n, f in sets.items() if not f or probe(compiler, program, f) is None}


def find_python_headers() -> str:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stop(
            f"dream-kernels needs the headers of Python {version}, and Python.h was not found in "
            f"{include}; install them (Debian/Ubuntu: apt-get install python{version}-dev)"
        )
    return include


def targets_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and "arm64" not in words("ARCHFLAGS")


def cuda_wanted() -> bool | None:
    """Whether the kernels for NVIDIA GPUs are to be built; None: where nvcc is found."""
    value = os.environ.get("DREAM_KERNELS_CUDA", "")
    if value not in ("", "0", "1"):
        stop(f"DREAM_KERNELS_CUDA must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_nvcc() -> str | None:
    """nvcc in CUDA_HOME, on PATH, or in the packages of PyPI."""
    home = os.environ.get("CUDA_HOME")
    packages = [str(Path(path, "nvidia/cu13/bin")) for path in sys.path]
    for path in ([str(Path(home, "bin"))] if home else [None]) + packages:
        found = shutil.which("nvcc", path=path)
        if found:
            return found
    return None


def cuda_archs(nvcc: str) -> list[str]:
    """The compute capabilities to compile for: those that were asked for, or that nvcc knows."""
    given = os.environ.get("DREAM_KERNELS_CUDA_ARCHS")
    if given is None:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in listed.stdout.split()]
    archs = re.split(r"[;, ]+", given.strip().replace(".", ""))
    if not all(re.fullmatch(r"\d{2,3}a?", arch) and int(arch.rstrip("a")) >= 80 for arch in archs):
        stop(
            'DREAM_KERNELS_CUDA_ARCHS must be compute capabilities from 80 on, such as "80;90", '
            f"got {given!r}"
        )
    return archs


def nvcc_command(compiler: list[str], nvcc: str, archs: list[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs[-1:] if a.isdigit()]
    host = ["-ccbin", shutil.which(compiler[0]) or compiler[0], "-allow-unsupported-compiler"]
    return [nvcc, "-std=c++17", "-O3", "-fatbin", "-Xfatbin=-compress-all", *codes, *host]


def nvcc_version(nvcc: str) -> str:
    listed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"V(\d+(\.\d+)+)", listed.stdout)
    return found[1] if found else "unknown"


def find_cuda(compiler: list[str]) -> tuple[list[str], list[str]] | None:
    """Return nvcc's command line and macros that describe it, or None and say why not."""
    wanted = cuda_wanted()
    nvcc = None if wanted is False else find_nvcc()
    reason = "DREAM_KERNELS_CUDA=0" if wanted is False else "nvcc was not found"
    if nvcc is not None:
        archs = cuda_archs(nvcc)
        command = nvcc_command(compiler, nvcc, archs)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text("__global__ void probe() {}\n", encoding="utf-8")
            tried = subprocess.run(
                [*command, str(source), "-o", str(source.with_suffix(".fatbin"))],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        if archs and tried.returncode == 0:
            return command, [
                f'-DDREAM_KERNELS_CUDA_ARCHS="{" ".join(archs)}"',
                f'-DDREAM_KERNELS_NVCC="{nvcc_version(nvcc)}"',
            ]
        said = (tried.stderr.splitlines() or ["it gave no reason"])[0]
        reason = f"{nvcc} does not compile for {' '.join(archs) or 'sm_80 or newer'}: {said}"
    if wanted:
        stop(f"DREAM_KERNELS_CUDA=1, and {reason}")
    print(
        f'dream-kernels: impl="cuda" is left out ({reason}); to get it, build with nvcc on PATH or '
        "in CUDA_HOME, or with DREAM_KERNELS_CUDA=1, which takes nvcc from PyPI"
    )
    return None


def cuda_rules(compiler: list[str], command: list[str]) -> tuple[list[str], list[str]]:
    """Return ninja's lines for the kernels' binaries in objects, and these objects."""
    lines = [
        "rule nvcc",
        f"  command = {quoted(command)} -DDREAM_PART=$part -MD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule embed",
        f"  command = {quoted([*compiler, *words('CPPFLAGS')])} -DDREAM_NAME=dream_binary_$part "
        "-DDREAM_FILE='\"$binary\"' -c $in -o $out",
        "  description = embed $binary",
    ]
    objects = []
    for part in CUDA_PARTS:
        binary, name = f"{part}.fatbin", f"{part}.fatbin.o"
        lines += [f"build {binary}: nvcc {escaped(CSRC / 'cuda/kernels.cu')}", f"  part = {part}"]
        lines += [f"build {name}: embed {escaped(CSRC / 'cuda/embed.S')} | {binary}"]
        lines += [f"  part = {part}", f"  binary = {binary}"]
        objects.append(name)
    return lines, objects


def quoted(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_rules(compiler: list[str], includes: list[str], target: Path) -> str:
    """Return the build.ninja that makes ``target``; objects lie beside it in the build folder."""
    sets = instruction_sets(compiler)
    cuda = find_cuda(compiler)
    compile_command = [
        *compiler,
        *FLAGS,
        *(f"-DDREAM_KERNELS_HAS_{name}" for name in sets),
        *(f"-I{path}" for path in includes),
        *words("ARCHFLAGS"),
        *words("CPPFLAGS"),
        *words("CXXFLAGS"),
    ]
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    link_command = [*compiler, *shared, "-pthread", *words("ARCHFLAGS"), *words("LDFLAGS")]

    lines = [
        "rule compile",
        f"  command = {quoted(compile_command)} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {quoted(link_command)} $in -o $out",
        "  description = link $out",
    ]
    objects: list[str] = []
    if cuda is not None:
        more, objects = cuda_rules(compiler, cuda[0])
        lines += more
    for source in SOURCES:
        variants = {"": ""}
        if source == CUDA_BINARIES:
            variants = {"": shlex.join(cuda[1] if cuda else [])}
        if source == KERNEL:
            variants = {
                f".{name}": shlex.join([f"-DDREAM_KERNELS_ISA={name}", *flags])
                for name, flags in sets.items()
            }
        for suffix, extra in variants.items():
            name = source.replace("/", ".").removesuffix(".cpp") + suffix + ".o"
            lines += [f"build {name}: compile {escaped(ROOT / source)}", f"  extra = {extra}"]
            objects.append(name)
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """Compiles with as many processes as MAX_JOBS or the machine allows, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        compiler = find_compiler()
        includes = [find_python_headers(), pybind11.get_include()]
        check_compiler(compiler)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rules = ninja_rules(compiler, includes, target)
        (folder / "build.ninja").write_text(rules, encoding="utf-8")

        executable = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
        if executable is None:
            stop("dream-kernels needs ninja, and it was not found; run: pip install ninja")
        command = [executable, "-C", str(folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if self.verbose > 1:
            command.append("-v")
        if subprocess.run(command, check=False).returncode != 0:
            stop("the native extension of dream-kernels could not be compiled; see the lines above")


# nvcc from PyPI comes with the other requirements of the build.
packages = NVCC_PACKAGES if cuda_wanted() and find_nvcc() is None else []
setup(
    setup_requires=packages,
    ext_modules=[Extension("dream_kernels._native", SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildWithNinja},
)
