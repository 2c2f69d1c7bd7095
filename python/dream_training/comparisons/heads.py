"""``dream heads --compare``: several choices of heads side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels import HeadFile, read_heads, write_heads
from dream_training.heads.contrast import Contrast, measure_contrast
from dream_training.heads.selection import (
    WITHOUT_LABELS,
    HeadExample,
    examples_digest,
    select_heads,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dream_training.comparisons.objectives import Row
    from dream_training.config import TrainConfig
    from dream_training.reading.reader import Reader

RANDOM = "random"
# Options of select_heads that have another name in the provenance.
_RECORDED = {"reader_name": "reader", "data_name": "data"}


@dataclass
class ComparedChoice:
    """One choice of heads and what it does.

    Attributes:
        name: of the criterion, or ``random-<seed>``.
        heads: all heads of the reader, best first.
        path: where they are written.
        contrast: target losses with the best ``top_k``, None where no positives are known.
        training: nDCG@10 after training by data set, one per seed; empty without training.
    """

    name: str
    heads: HeadFile
    path: Path
    contrast: Contrast | None = None
    training: dict[str, list[float]] = field(default_factory=dict)

    def best(self, top_k: int) -> frozenset[tuple[int, int]]:
        """The ``top_k`` heads that this choice would use."""
        return frozenset(self.heads.heads[:top_k])


def choose(
    reader: Reader,
    examples: Sequence[HeadExample],
    folder: Path,
    *,
    criteria: Sequence[str],
    draws: int,
    options: Mapping[str, Any],
) -> list[ComparedChoice]:
    """Select heads by every criterion, and write them as ``<name>.yaml`` to ``folder``.

    A file that is there already and was made with the same options is read instead.

    Args:
        reader: the reader; its own heads do not matter here.
        examples: for the criteria that look at examples.
        folder: where head files are.
        criteria: names as in :func:`select_heads`.
        draws: how many times ``"random"`` is drawn, with seeds from 0.
        options: of :func:`select_heads`.

    Raises:
        ValueError: as :func:`select_heads`.
    """
    choices = []
    for criterion in criteria:
        for seed in range(draws) if criterion == RANDOM else (None,):
            name = criterion if seed is None else f"{criterion}-{seed}"
            own = dict(options) if seed is None else {**options, "seed": seed}
            path = folder / f"{name}.yaml"
            heads = _earlier_choice(path, criterion, reader, examples, own)
            if heads is None:
                heads = select_heads(reader, examples, criterion=criterion, **own)
                write_heads(path, heads)
            choices.append(ComparedChoice(name, heads, path))
    return choices


def measure(
    reader: Reader, choices: Sequence[ComparedChoice], top_k: int, examples: Sequence[HeadExample]
) -> None:
    """Add the target losses on the examples to every choice, each with its best ``top_k`` heads.

    Raises:
        ValueError: the reader has fewer heads, or an example has no positive.
    """
    own_heads = reader.injection.heads
    try:
        for choice in choices:
            reader.injection.use_heads(choice.heads.by_layer(top_k))
            choice.contrast = measure_contrast(reader, examples)
    finally:
        reader.injection.use_heads(own_heads)


def train_with(
    choices: Sequence[ComparedChoice],
    config: TrainConfig,
    top_k: int,
    seeds: Sequence[int],
    console: Console,
    overwrite: bool = False,
) -> None:
    """Train a retriever with every choice and seed, and add what came out to the choices.

    Done by :func:`~dream_training.comparisons.objectives.run_comparison`: a training that has its
    result is not repeated, so that a long comparison can be stopped and resumed.

    Args:
        choices: with their head files.
        config: the run; ``output_dir`` gets a folder for every choice and seed.
        top_k: how many heads of every choice receive the scores.
        seeds: of the trainings.
        console: where to print.
        overwrite: replace results of other heads or another config.

    Raises:
        FileExistsError: there are such results, and ``overwrite`` is not set.
        ValueError: the config evaluates nothing, is not of objective ``dream``, or has ``taught``.
        KeyboardInterrupt: Ctrl-C; what is complete is kept.
    """
    from dream_training.comparisons.objectives import Comparison, run_comparison

    if config.evaluation.eval_data is None:
        raise ValueError("the training config of a comparison of heads needs eval_data")
    if config.objective.name != "dream":
        raise ValueError(f"heads matter to objective 'dream' alone, got {config.objective.name!r}")
    if config.data.taught is not None:
        raise ValueError(
            "taught must be null where heads are compared: its verdicts have their own"
        )
    runs = {choice.name: {"heads": str(choice.path), "top_k": top_k} for choice in choices}
    compared = Comparison(config, runs, seeds, keep_models=False)
    rows = run_comparison(compared, console, overwrite=overwrite)
    _add_training(choices, rows)


def _add_training(choices: Sequence[ComparedChoice], rows: Sequence[Row]) -> None:
    by_name = {row.name: row for row in rows}
    for choice in choices:
        if choice.name in by_name:
            choice.training = by_name[choice.name].scores


def overlap(choices: Sequence[ComparedChoice], top_k: int) -> dict[str, dict[str, float]]:
    """Return the Jaccard index of the ``top_k`` heads of every two choices."""
    best = {choice.name: choice.best(top_k) for choice in choices}
    return {a: {b: len(best[a] & best[b]) / len(best[a] | best[b]) for b in best} for a in best}


def to_json(choices: Sequence[ComparedChoice], top_k: int) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "top_k": top_k,
        "overlap": overlap(choices, top_k),
        "choices": [
            {
                "name": choice.name,
                "heads": [list(head) for head in choice.heads.heads[:top_k]],
                "provenance": choice.heads.provenance,
                "losses": None if choice.contrast is None else _losses(choice.contrast),
                "ndcg_at_10": choice.training,
            }
            for choice in choices
        ],
    }


def _losses(contrast: Contrast) -> dict[str, Any]:
    gap, error = contrast.gap()
    return {
        **contrast.means(),
        "wrong_minus_right": gap,
        "standard_error": error,
        "queries": len(contrast.right),
    }


def usable(criteria: Sequence[str], labelled: bool) -> list[str]:
    """The criteria that can be used on data with or without known positives."""
    return [name for name in criteria if labelled or name in WITHOUT_LABELS]


def training_config(config: TrainConfig, folder: Path, top_k: int) -> TrainConfig:
    """The config of the trainings, its results in a folder of their own for every ``top_k``."""
    return config.with_changes(output_dir=str(folder / f"training-top{top_k}"))


def _earlier_choice(
    path: Path,
    criterion: str,
    reader: Reader,
    examples: Sequence[HeadExample],
    options: Mapping[str, Any],
) -> HeadFile | None:
    """An earlier choice by the same criterion with the same options, if there is one."""
    if not path.is_file():
        return None
    found = read_heads(path)
    wanted = {_RECORDED.get(key, key): value for key, value in options.items()}
    if criterion != RANDOM:
        wanted |= {"examples": len(examples), "context": reader.context}
        wanted["examples_digest"] = examples_digest(examples)
        wanted |= {"passage_max_len": reader.tokens.passage_max_len}
    wanted["criterion"] = criterion
    made = found.provenance
    # What a criterion does not depend on is not in its provenance.
    return found if all(made.get(key, value) == value for key, value in wanted.items()) else None
