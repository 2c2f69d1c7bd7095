"""What is installed, against the folders of the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for name, folder in settings["package-dir"].items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((name, *path.parent.relative_to(ROOT / folder).parts)))
    assert set(settings["packages"]) == found
