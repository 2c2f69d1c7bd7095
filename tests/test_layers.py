"""Imports run one way: no cycles, and none against the order of layers in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "dream_kernels": ROOT / "dream_kernels",
    "dream_training": ROOT / "python" / "dream_training",
    "dream_benchmarks": ROOT / "benchmarks",
}
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """The file of every module of the packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a module imports: at its top, within functions, and for types."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield inner if inner in known else base


@pytest.fixture(scope="module")
def graph() -> Graph:
    known = modules()
    return {name: {*imports(name, path, known)} - {name} for name, path in known.items()}


def circle(graph: Graph) -> list[str]:
    """The modules of a cycle in the order of their imports; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := walk(other, [*above, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def unit(name: str) -> str:
    """A package's module or folder: ``dream_training.reading`` of ``dream_training.reading.x``."""
    return ".".join(name.split(".")[:2])


def layers() -> dict[str, int]:
    """The height of every unit; those in one line of CONTRIBUTING.md have the same."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```layers\n(.*?)```", page, flags=re.DOTALL)
    lines = [line.split() for line in block.splitlines() if line.strip()]
    found: dict[str, int] = {}
    package = ""
    for height, words in enumerate(lines):
        if words[0].endswith(":"):
            package, *words = words[0][:-1], *words[1:]
        for word in words:
            assert f"{package}.{word}" not in found, f"{word} is in two layers"
            found[f"{package}.{word}"] = height
    return found


def upward(graph: Graph, heights: dict[str, int]) -> list[str]:
    """Imports that run up, or between two units of one layer.

    A package's own module gathers what is public; nothing of the package may import it.
    """
    return sorted(
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if unit(name) != unit(other)
        and name not in PACKAGES
        and (
            other.partition(".")[0] == name.partition(".")[0]
            if other in PACKAGES
            else heights[unit(other)] >= heights[unit(name)]
        )
    )


def test_there_is_no_cycle(graph: Graph) -> None:
    found = circle(graph)
    assert not found, " imports ".join(found)


def test_every_module_has_its_layer(graph: Graph) -> None:
    assert {unit(name) for name in graph} - {*PACKAGES} == {*layers()}


def test_imports_run_down(graph: Graph) -> None:
    found = upward(graph, layers())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_are_layered(graph: Graph, name: str) -> None:
    order = list(PACKAGES)
    above = order[order.index(name) + 1 :]
    assert not [
        f"{module} imports {other}"
        for module in graph
        for other in graph[module]
        if module.partition(".")[0] == name and other.partition(".")[0] in above
    ]


def test_what_runs_up_is_found() -> None:
    heights = {"dream_kernels.a": 0, "dream_kernels.b": 1, "dream_kernels.c": 1}
    graph = {
        "dream_kernels": {"dream_kernels.b"},
        "dream_kernels.a": {"dream_kernels.b.x"},
        "dream_kernels.b.x": {"dream_kernels.a", "dream_kernels.c", "dream_kernels.b.y"},
        "dream_kernels.b.y": {"dream_kernels"},
    }
    assert upward(graph, heights) == [
        "dream_kernels.a imports dream_kernels.b.x",
        "dream_kernels.b.x imports dream_kernels.c",
        "dream_kernels.b.y imports dream_kernels",
    ]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
