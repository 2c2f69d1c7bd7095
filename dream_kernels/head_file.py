"""Files that name the attention heads that receive the scores.

Two forms are read and written, both from the QRHead project (Zhang et al., EMNLP 2025): YAML with
the chosen heads, best first, as ``attn_head_set: "17-3,12-0"`` (a list of ``"layer-head"`` works
too), and JSON with the score of every head, ``{"17-3": 0.53, ...}`` sorted from the best. Files
written here also record how many heads were chosen, under ``top_k``, and how, under ``provenance``;
they hold the scores of all heads beside the chosen ones.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dream_kernels.files import is_stream, write_text
from dream_kernels.parsing import parse_json, parse_yaml, read_text, shortened

HEADS_KEY = "attn_head_set"
SCORES_KEY = "head_scores"
TOP_K_KEY = "top_k"
PROVENANCE_KEY = "provenance"


@dataclass(frozen=True)
class HeadFile:
    """The content of a head file.

    Attributes:
        heads: ``(layer, head)`` pairs, best first.
        scores: the score of each pair, empty when the file has none.
        provenance: how the heads were chosen: reader, criterion, data, null query, ...
        chosen: how many of ``heads`` receive the scores. None when the file does not say: a plain
            list then means all of its heads, and a ranking by a criterion none of them.

    Raises:
        ValueError: ``chosen`` is more than there are heads, or not positive.
    """

    heads: list[tuple[int, int]]
    scores: dict[tuple[int, int], float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    chosen: int | None = None

    def __post_init__(self) -> None:
        if self.chosen is not None and not 1 <= self.chosen <= len(self.heads):
            raise ValueError(f"top_k must lie in 1 .. {len(self.heads)}, got {self.chosen}")

    def choose(self, top_k: int | None = None) -> HeadFile:
        """Return the same heads with the first ``top_k`` chosen; None keeps the choice made.

        Raises:
            ValueError: there are fewer than ``top_k`` heads, or they are a ranking in which none
                were chosen and ``top_k`` is not given.
        """
        chosen = self.chosen if top_k is None else top_k
        if chosen is None:
            if self.scores or "criterion" in self.provenance:
                raise ValueError(
                    f"the heads are a ranking of {len(self.heads)} in which none are chosen: "
                    "give top_k, how many of the best receive the scores"
                )
            chosen = len(self.heads)
        return replace(self, chosen=chosen)

    def by_layer(self, top_k: int | None = None) -> dict[int, list[int]]:
        """Return ``{layer: [head, ...]}`` of the chosen heads, or of the first ``top_k``.

        Raises:
            ValueError: as :meth:`choose`.
        """
        layers: dict[int, list[int]] = {}
        for layer, head in self.heads[: self.choose(top_k).chosen]:
            layers.setdefault(layer, []).append(head)
        return {layer: sorted(heads) for layer, heads in sorted(layers.items())}


def head_name(layer: int, head: int) -> str:
    """Return the ``"layer-head"`` form used in head files."""
    return f"{layer}-{head}"


def _parse_head(name: object, source: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d{1,9})-(\d{1,9})\s*", name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f'{source}: a head must be written "layer-head", got {shortened(name)}')
    return int(match[1]), int(match[2])


def _parse_names(names: object, source: str) -> list[tuple[int, int]]:
    if isinstance(names, str):
        names = names.split(",")
    if not isinstance(names, list):
        raise ValueError(f"{source}: heads must be a list or a text, got {type(names).__name__}")
    heads: dict[tuple[int, int], None] = {}
    for name in names:
        head = _parse_head(name, source)
        if head in heads:
            raise ValueError(f"{source}: head {head_name(*head)} is named twice")
        heads[head] = None
    if not heads:
        raise ValueError(f"{source}: names no head")
    return list(heads)


def _parse_scores(scores: object, source: str) -> dict[tuple[int, int], float]:
    # QRHead's detection scripts write a mapping or a list of [name, score] pairs.
    if isinstance(scores, Mapping):
        pairs = list(scores.items())
    elif isinstance(scores, list) and all(isinstance(p, list) and len(p) == 2 for p in scores):
        pairs = [tuple(pair) for pair in scores]
    else:
        raise ValueError(f"{source}: scores must map heads to numbers, got {type(scores).__name__}")
    parsed: dict[tuple[int, int], float] = {}
    for name, score in pairs:
        head = _parse_head(name, source)
        if not _is_number(score):
            raise ValueError(
                f"{source}: the score of {name!r} must be a number, got {shortened(score)}"
            )
        if head in parsed:
            raise ValueError(f"{source}: head {head_name(*head)} is named twice")
        parsed[head] = float(score)
    if not parsed:
        raise ValueError(f"{source}: names no head")
    return parsed


def _is_number(score: object) -> bool:
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return False
    try:
        return math.isfinite(score)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _parse_provenance(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    provenance = content.get(PROVENANCE_KEY)
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise ValueError(f"{source}: provenance must be a map, got {type(provenance).__name__}")
    return dict(provenance)


def read_heads(path: str | os.PathLike[str]) -> HeadFile:
    """Read a head file, YAML or JSON by its extension.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is neither form; the message names the file.
    """
    path = Path(path)
    source = str(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{source}: a head file must end in .yaml, .yml or .json")
    text = read_text(path)
    content = parse_json(text, source) if path.suffix == ".json" else parse_yaml(text, source)

    provenance: dict[str, Any] = {}
    chosen: int | None = None
    if isinstance(content, Mapping) and HEADS_KEY in content:
        heads = _parse_names(content[HEADS_KEY], source)
        if TOP_K_KEY in content:
            chosen = len(heads)
            if content[TOP_K_KEY] != chosen:
                raise ValueError(
                    f"{source}: {TOP_K_KEY} must be {chosen}, the number of heads in {HEADS_KEY}, "
                    f"got {shortened(content[TOP_K_KEY])}"
                )
        scores = {}
        if SCORES_KEY in content:
            scores = _parse_scores(content[SCORES_KEY], source)
            others = scores.keys() - set(heads)
            if others:
                chosen = len(heads)
            heads += sorted((h for h in scores if h in others), key=lambda head: -scores[head])
        provenance = _parse_provenance(content, source)
    elif isinstance(content, list) and content and isinstance(content[0], str):
        heads, scores = _parse_names(content, source), {}
    else:
        if isinstance(content, Mapping) and SCORES_KEY in content:
            provenance = _parse_provenance(content, source)
            content = content[SCORES_KEY]
        scores = _parse_scores(content, source)
        heads = sorted(scores, key=lambda head: -scores[head])
    return HeadFile(heads, scores, provenance, chosen)


def read_chosen_heads(path: str | os.PathLike[str], top_k: int | None = None) -> HeadFile:
    """Read a head file and choose: :func:`read_heads`, then :meth:`HeadFile.choose`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as either; the message names the file.
    """
    head_file = read_heads(path)
    try:
        return head_file.choose(top_k)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def write_heads(path: str | os.PathLike[str], head_file: HeadFile) -> Path:
    """Write a head file, YAML or JSON by its extension; an existing file is replaced atomically.

    It names the chosen heads of :attr:`HeadFile.heads`, and holds the score of every head where
    there are scores. If none are chosen, YAML names all, and JSON holds the scores alone.
    ``-`` is standard output; there, and on devices and pipes, it is YAML unless the name ends in
    ``.json``.

    Raises:
        ValueError: the extension is unknown, or JSON was requested and there are no scores.
    """
    path = Path(path)
    chosen, scores = head_file.chosen, head_file.scores
    names = ",".join(head_name(*head) for head in head_file.heads[:chosen])
    content: dict[str, Any] = {} if chosen is None else {HEADS_KEY: names, TOP_K_KEY: chosen}
    if path.suffix in (".yaml", ".yml") or (is_stream(path) and path.suffix != ".json"):
        import yaml

        content[HEADS_KEY] = names
        if scores:
            ranked = [head for head in head_file.heads if head in scores]
            content[SCORES_KEY] = {head_name(*head): scores[head] for head in ranked}
        content[PROVENANCE_KEY] = head_file.provenance
        text = yaml.safe_dump(content, sort_keys=False, width=10_000)
    elif path.suffix == ".json":
        if not scores:
            raise ValueError(f"{path}: JSON head files hold scores, and there are none")
        ranked = sorted(scores, key=lambda head: -scores[head])
        content[SCORES_KEY] = {head_name(*head): scores[head] for head in ranked}
        content[PROVENANCE_KEY] = head_file.provenance
        text = json.dumps(content, indent=1) + "\n"
    else:
        raise ValueError(f"{path}: a head file must end in .yaml, .yml or .json")
    write_text(path, text)
    return path
