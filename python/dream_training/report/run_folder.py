"""The folder of a run, read back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_kernels import HeadFile, read_heads
from dream_training.evaluation.results import FILE_NAME, Evaluation, read_evaluations
from dream_training.history import History
from dream_training.json_file import read_json
from dream_training.training.output_folder import ENVIRONMENT, EXAMPLES


@dataclass(frozen=True)
class Run:
    """The results of a run; what the folder lacks is empty.

    Attributes:
        name: unique among the runs of a report.
        path: its folder.
        config: ``config.json``.
        history: ``history.json``.
        heads: ``heads.yaml``, None for objectives without a reader.
        evaluations: ``evaluation.json``.
        examples: ``examples.json``.
        environment: ``environment.json``.
    """

    name: str
    path: Path
    config: dict[str, Any]
    history: History
    heads: HeadFile | None
    evaluations: list[Evaluation]
    examples: dict[str, Any]
    environment: dict[str, Any]

    @property
    def top_k(self) -> int:
        """Number of heads that received the scores."""
        count = len(self.heads.heads) if self.heads else 0
        if self.heads and self.heads.chosen is not None:
            return self.heads.chosen
        return min(self.config.get("top_k") or count, count)

    @property
    def interrupted(self) -> bool:
        return len(self.history.steps) < int(self.config.get("max_steps") or 0)


def read_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read the folder of a run.

    Args:
        path: ``output_dir`` of the run.
        name: how it is called; the folder's name by default.

    Raises:
        FileNotFoundError: the folder is not that of a run that has ended.
        ValueError: a file has other content; the message names it.
    """
    path = Path(path)
    for file in ("config.json", "history.json"):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"{path}: has no {file}; expected the output_dir of a run that has ended"
            )
    history = read_json(path / "history.json")
    for key in ("steps", "evaluations"):
        if not isinstance(history.get(key), list):
            raise ValueError(f"{path / 'history.json'}: must hold a list named {key!r}")
    heads = path / "heads.yaml"
    return Run(
        name=name or path.resolve().name,
        path=path,
        config=read_json(path / "config.json"),
        history=History(history["steps"], history["evaluations"]),
        heads=read_heads(heads) if heads.is_file() else None,
        evaluations=read_evaluations(path) if (path / FILE_NAME).is_file() else [],
        examples=_optional(path / EXAMPLES),
        environment=_optional(path / ENVIRONMENT),
    )


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs, named by their folders, or by their paths where those are equal."""
    folders = [Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names)]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
