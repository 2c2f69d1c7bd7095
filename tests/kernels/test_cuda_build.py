"""How setup.py finds nvcc, and what it says where there is none."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  --list-gpu-code) echo sm_52; echo sm_80; echo sm_90 ;;
  *) {rest} ;;
esac
"""


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions of setup.py, where no nvcc is to be found."""
    setuptools = pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("DREAM_KERNELS_CUDA", "DREAM_KERNELS_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", os.defpath)
    without = [path for path in sys.path if not Path(path, "nvidia", "cu13").exists()]
    monkeypatch.setattr(sys, "path", without)
    spec = importlib.util.spec_from_file_location("dream_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_nvcc(folder: Path, rest: str = "exit 0") -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC.replace("{rest}", rest))
    path.chmod(0o755)
    return path


def test_without_nvcc_one_line_says_how_to_get_the_kernels(setup, capsys) -> None:
    assert setup.find_cuda(["c++"]) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert 'impl="cuda" is left out (nvcc was not found)' in line
    assert "DREAM_KERNELS_CUDA=1, which takes nvcc from PyPI" in line


def test_kernels_that_are_demanded_need_nvcc(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAM_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="error: DREAM_KERNELS_CUDA=1, and nvcc was not found"):
        setup.find_cuda(["c++"])


def test_kernels_may_be_left_out(setup, monkeypatch, tmp_path: Path, capsys) -> None:
    make_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DREAM_KERNELS_CUDA", "0")
    assert setup.find_cuda(["c++"]) is None
    assert "left out (DREAM_KERNELS_CUDA=0)" in capsys.readouterr().out


@pytest.mark.parametrize("where", ("CUDA_HOME", "PATH", "packages"))
def test_where_nvcc_is_looked_for(setup, monkeypatch, tmp_path: Path, where: str) -> None:
    """And only what it knows of the architectures is compiled for, with PTX of the last."""
    folder = tmp_path / "nvidia" / "cu13" if where == "packages" else tmp_path
    nvcc = make_nvcc(folder)
    if where == "packages":
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    else:
        value = folder if where == "CUDA_HOME" else nvcc.parent
        monkeypatch.setenv(where, f"{value}" + (f":{os.environ[where]}" if where == "PATH" else ""))
    command, macros = setup.find_cuda(["c++"])
    assert command[0] == str(nvcc)
    assert [word for word in command if word.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert shlex.split(" ".join(macros)) == [
        "-DDREAM_KERNELS_CUDA_ARCHS=80 90", "-DDREAM_KERNELS_NVCC=12.4.131",
    ]  # fmt: skip


def test_an_nvcc_that_fails_is_no_nvcc(setup, monkeypatch, tmp_path: Path, capsys) -> None:
    make_nvcc(tmp_path, "echo no cudafe >&2; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_cuda(["c++"]) is None
    assert "does not compile for 80 90: no cudafe); to get it" in capsys.readouterr().out
    monkeypatch.setenv("DREAM_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="does not compile for 80 90: no cudafe"):
        setup.find_cuda(["c++"])


@pytest.mark.parametrize(
    "name,value,message",
    (
        ("DREAM_KERNELS_CUDA", "yes", "DREAM_KERNELS_CUDA must be 0 or 1, got 'yes'"),
        ("DREAM_KERNELS_CUDA_ARCHS", "75", "capabilities from 80 on, such as .*, got '75'"),
        ("DREAM_KERNELS_CUDA_ARCHS", "native", "got 'native'"),
    ),
)
def test_bad_settings_are_named(
    setup, monkeypatch, tmp_path: Path, name: str, value: str, message: str
) -> None:
    make_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        setup.find_cuda(["c++"])


def test_architectures_may_be_named(setup, monkeypatch) -> None:
    monkeypatch.setenv("DREAM_KERNELS_CUDA_ARCHS", "8.0; 9.0")
    assert setup.cuda_archs("nvcc") == ["80", "90"]
