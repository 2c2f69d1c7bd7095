"""The table of ``docs/readers.md``: what injection does with each architecture."""

from __future__ import annotations

from pathlib import Path

import transformers

from helpers.reader_matrix import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "readers.md"
VERSION = ".".join(transformers.__version__.split(".")[:2])
_HEAD = "| Architecture |"
_EMPTY = ""


def cell(outcome: Outcome) -> str:
    """What the table says of an architecture in one version of transformers."""
    if outcome.refused:
        return f"refused: {outcome.heads.removeprefix('not one of its layers can be: ')}"
    if outcome.prefix == "yes":
        return f"{outcome.heads}; prefix"
    return f"{outcome.heads}; no prefix: {outcome.prefix}"


def read_table() -> tuple[list[str], dict[str, list[str]]]:
    """The versions and, for each architecture, what the table says of each of them."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    versions = [column.removeprefix("transformers ") for column in _columns(lines[0])[1:]]
    rows = {name: cells for name, *cells in map(_columns, lines[2:])}
    return versions, rows


def write_column(cells: dict[str, str]) -> None:
    """Replace what the table says of this version of transformers."""
    versions, rows = read_table()
    if VERSION not in versions:
        versions.append(VERSION)
        rows = {name: [*row, _EMPTY] for name, row in rows.items()}
    place = versions.index(VERSION)
    for row in rows.values():
        row[place] = _EMPTY
    for name, text in cells.items():
        rows.setdefault(name, [_EMPTY] * len(versions))[place] = text
    order = sorted(range(len(versions)), key=lambda i: tuple(map(int, versions[i].split("."))))
    versions = [versions[i] for i in order]
    rows = {name: [row[i] for i in order] for name, row in rows.items()}
    lines = [
        _line("Architecture", *(f"transformers {version}" for version in versions)),
        _line(*["---"] * (1 + len(versions))),
        *(_line(name, *row) for name, row in sorted(rows.items()) if any(row)),
    ]
    text = PAGE.read_text()
    before, after = text.split(_HEAD)[0], text.splitlines()
    last = max(i for i, line in enumerate(after) if line.startswith("|"))
    PAGE.write_text(before + "\n".join([*lines, *after[last + 1 :]]) + "\n")


def _columns(line: str) -> list[str]:
    return [column.strip() for column in line.strip("|").split("|")]


def _line(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"
