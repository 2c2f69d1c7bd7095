"""Builds the native extension with ninja. Everything else about the package is in pyproject.toml.

Environment: CXX, CXXFLAGS, CPPFLAGS, LDFLAGS, ARCHFLAGS as usual; MAX_JOBS limits the compilers
that run at once.
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
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*.h"))

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


def ninja_rules(compiler: list[str], includes: list[str], target: Path) -> str:
    """Return the build.ninja that makes ``target``; objects lie beside it in the build folder."""
    sets = instruction_sets(compiler)
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

    def command(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    def path(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "rule compile",
        f"  command = {command(compile_command)} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command(link_command)} $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in SOURCES:
        variants = {"": ""}
        if source == KERNEL:
            variants = {
                f".{name}": shlex.join([f"-DDREAM_KERNELS_ISA={name}", *flags])
                for name, flags in sets.items()
            }
        for suffix, extra in variants.items():
            name = source.replace("/", ".").removesuffix(".cpp") + suffix + ".o"
            lines += [f"build {name}: compile {path(ROOT / source)}", f"  extra = {extra}"]
            objects.append(name)
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
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


setup(
    ext_modules=[Extension("dream_kernels._native", SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildWithNinja},
)
