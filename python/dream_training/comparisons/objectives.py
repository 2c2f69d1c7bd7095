"""``dream compare``: several ways of training with equal budgets and seeds, in one table."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dream_kernels.head_file import read_chosen_heads
from dream_training.checkpointing.folder import add_file
from dream_training.choices import OBJECTIVES
from dream_training.config import (
    TrainConfig,
    flatten,
    make_config,
    read_yaml,
)
from dream_training.console import make_table, show_on, shows_progress
from dream_training.data.beir_folder import beir_file
from dream_training.json_file import read_json, write_json
from dream_training.training.output_folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    HEADS,
    LAST,
    RESULT,
    results_in,
)

_METRIC = "ndcg_at_10"
_SECTION = "compare"
# What a run writes beside what it is: it may differ without the result being another one.
_INCIDENTAL = ("output_dir", "log_steps", "save_steps", "keep_checkpoints")
# What decides the scores of the retriever before its first step.
_START = (
    *("retriever", "retriever_layers", "lora_r", "seed", "dtype", "query_prompt"),
    *("document_prompt", "query_max_len", "passage_max_len", "eval_split"),
    "keep_identical_ids",
)
_Untrained = dict[tuple[str, ...], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        base: the config that all runs share.
        runs: by name, the keys in which a run differs from the base.
        seeds: every run is trained once with each.
        evaluate: BEIR folders that the trained retriever is evaluated on, beside ``eval_data``.
        keep_models: whether ``best/`` and ``last/`` of every run stay on disk.
    """

    base: TrainConfig
    runs: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0,)
    evaluate: Sequence[str] = ()
    keep_models: bool = True

    @property
    def folders(self) -> list[str]:
        """The BEIR folders of all evaluations."""
        own = [] if self.base.evaluation.eval_data is None else [self.base.evaluation.eval_data]
        return [*own, *self.evaluate]

    def config(self, run: str, seed: int) -> TrainConfig:
        """The config of one training."""
        folder = Path(self.base.output.output_dir) / run / f"seed{seed}"
        return self.base.with_changes(**self.runs[run], seed=seed, output_dir=str(folder))


@dataclass
class Row:
    """One run over all its seeds.

    Attributes:
        name: of the run.
        scores: by data set, nDCG@10 after the last step, one per seed.
        untrained: by data set, nDCG@10 before the first step, one per seed.
        seconds: of the training, one per seed.
    """

    name: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    untrained: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def load_comparison(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Comparison:
    """Read a training config with a ``compare`` section.

    The section may hold ``runs`` (by name, the keys in which a run differs; every objective by
    default), ``seeds``, ``evaluate`` and ``keep_models``; see :class:`Comparison`::

        compare:
          seeds: [0, 1, 2]
          runs:
            dream: {objective: dream}
            dream, joint reading: {objective: dream, context: joint}
            infonce: {objective: infonce, temperature: 0.02}

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or does not fit, or nothing is evaluated.
    """
    values = read_yaml(path)
    section = values.pop(_SECTION, None) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {_SECTION} must hold keys and values, got {section!r}")
    base = make_config(values, overrides, str(path))
    known = ("runs", "seeds", "evaluate", "keep_models")
    for key in section:
        if key not in known:
            raise ValueError(f"{path}: {_SECTION} has {', '.join(known)}, got {key!r}")
    runs = section.get("runs") or default_runs()
    if not isinstance(runs, dict) or not all(isinstance(own, dict) for own in runs.values()):
        raise ValueError(f"{path}: {_SECTION}.runs must map names to keys and values, got {runs!r}")
    for name in runs:
        if Path(str(name)).name != str(name):
            raise ValueError(f"{path}: a run's name must do as a folder's name, got {name!r}")
    runs = {name: flatten(own, f"{path}: {_SECTION}.runs.{name}") for name, own in runs.items()}
    seeds = section.get("seeds", [base.run.seed])
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds) or not seeds:
        raise ValueError(f"{path}: {_SECTION}.seeds must be a list of whole numbers, got {seeds!r}")
    evaluate = section.get("evaluate") or []
    if not isinstance(evaluate, list):
        raise ValueError(f"{path}: {_SECTION}.evaluate must be a list of folders, got {evaluate!r}")
    if base.evaluation.eval_data is None and not evaluate:
        raise ValueError(f"{path}: a comparison needs eval_data, or {_SECTION}.evaluate")
    comparison = Comparison(base, runs, seeds, evaluate, bool(section.get("keep_models", True)))
    for name in runs:  # a mistake in the last run must not show after hours
        comparison.config(name, seeds[0])
    return comparison


def default_runs() -> dict[str, dict[str, Any]]:
    """Every objective under its own name, Revela at the temperature of its source."""
    runs: dict[str, dict[str, Any]] = {name: {"objective": name} for name in OBJECTIVES}
    runs["revela"]["temperature"] = 1e-4
    return runs


@shows_progress
def run_comparison(
    comparison: Comparison, console: Console, only: Sequence[str] = (), overwrite: bool = False
) -> list[Row]:
    """Train what has no result yet, seed by seed, and write tables and plot.

    A training that has its ``result.json`` with the same config is not repeated, so a long
    comparison can be stopped and resumed. Writes ``comparison.json`` and ``comparison.png``
    to the base's ``output_dir``, after every training.

    Args:
        comparison: what to compare.
        console: where to print.
        only: names of the runs to train; all by default.
        overwrite: replace results of other configs.

    Raises:
        FileExistsError: a run's folder has results of another config, and ``overwrite`` is not set.
        ValueError: ``only`` names a run that is not there, or a training refuses its data.
        KeyboardInterrupt: Ctrl-C; what is complete is kept.
    """
    from dream_training.plots import plot_comparison

    show_on(console)
    for name in only:
        if name not in comparison.runs:
            raise ValueError(f"there is no run {name!r}, only {', '.join(comparison.runs)}")
    folder = Path(comparison.base.output.output_dir)
    names = only or list(comparison.runs)
    if not overwrite:  # before hours of training
        for seed in comparison.seeds:
            for name in names:
                _check_same(comparison.config(name, seed))
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    untrained: _Untrained = {}
    # Seed by seed, so that a comparison that is stopped early compares the same seeds.
    for seed in comparison.seeds:
        for name in names:
            config = comparison.config(name, seed)
            if _earlier_result(config, comparison) is None:
                console.rule(f"{name}, seed {seed}")
                _measure(config, comparison, console, untrained)
            rows = collect(comparison)
            write_json(folder / "comparison.json", [asdict(row) for row in rows])
            plot_comparison(
                {row.name: row.scores for row in rows}, _untrained(rows), folder / "comparison.png"
            )
    return rows


def collect(comparison: Comparison) -> list[Row]:
    """Gather the results that are there, one row for each run that has any."""
    rows = []
    for name in comparison.runs:
        row = Row(name)
        for seed in comparison.seeds:
            result = _earlier_result(comparison.config(name, seed), comparison)
            if result is None:
                continue
            row.seconds.append(result["seconds"])
            for data, scores in result["scores"].items():
                row.scores.setdefault(data, []).append(scores["after"])
                row.untrained.setdefault(data, []).append(scores["before"])
        if row.seconds:
            rows.append(row)
    return rows


def _untrained(rows: Sequence[Row]) -> dict[str, list[float]]:
    """By data set, nDCG@10 of all runs and seeds before the first step."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for data, values in row.untrained.items():
            found.setdefault(data, []).extend(values)
    return found


def comparison_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """By data set, mean nDCG@10 and its standard deviation over the seeds."""
    for name in dict.fromkeys(data for row in rows for data in row.scores):
        table = make_table(name, "seeds", "untrained", "trained", "seconds")
        for row in rows:
            table.add_row(
                row.name,
                str(len(row.seconds)),
                _spread(row.untrained.get(name)),
                _spread(row.scores.get(name)),
                f"{statistics.median(row.seconds):,.0f}",
            )
        yield table


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _earlier_result(config: TrainConfig, comparison: Comparison) -> dict[str, Any] | None:
    """The result of an earlier run of the same config on the same data sets, if there is one."""
    path = Path(config.output.output_dir) / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    same = result["config"] == _identity(config) and _same_heads(config)
    # Results from before it was recorded are taken as they are.
    data = _data_of(config, comparison)
    same = same and result.get("data", data) == data
    return result if same and set(comparison.folders) <= set(result["evaluated"]) else None


def _data_of(config: TrainConfig, comparison: Comparison) -> dict[str, str]:
    """Digests of the files that a training and its evaluations read, by the key or folder."""
    taught = [] if config.data.taught is None else Path(config.data.taught).glob("*/*.json")
    found = {"train_data": files_digest(config.data.train_data, *map(str, sorted(taught)))}
    for folder in comparison.folders:
        parts = ("corpus.jsonl", "queries.jsonl", f"qrels/{config.evaluation.eval_split}.tsv")
        found[folder] = files_digest(*(str(beir_file(folder, part)) for part in parts))
    return found


def files_digest(*paths: str) -> str:
    """A digest of files; what is no file, such as a data set of the hub, is left out."""
    versions = []
    for path in map(Path, paths):
        if path.is_file():
            status = path.stat()
            versions.append((str(path), status.st_size, status.st_mtime_ns))
    return _files_digest(*versions)


@functools.cache
def _files_digest(*versions: tuple[str, int, int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, _, _ in versions:
        add_file(digest, Path(path))
    return digest.hexdigest()


def _identity(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in config.flat().items() if key not in _INCIDENTAL}


def _same_heads(config: TrainConfig) -> bool:
    """Whether a run with a head file was made with the heads that the file holds now."""
    used = Path(config.output.output_dir) / HEADS
    if config.heads.file == "auto" or not used.is_file():
        return True
    chosen = read_chosen_heads(config.heads.file, config.heads.top_k)
    return chosen.by_layer() == read_chosen_heads(used).by_layer()


def _check_same(config: TrainConfig) -> None:
    """Raise if training would replace the results of another config.

    Raises:
        FileExistsError: it would.
    """
    folder = Path(config.output.output_dir)
    if not results_in(folder):
        return
    before = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    now = json.loads(json.dumps(_identity(config)))
    reasons = [
        f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]
    ]
    if not _same_heads(config):
        reasons.append(f"other heads than {config.heads.file} has now")
    from dream_training.training.resuming import has_checkpoint_of

    # An unfinished training may resume with another number of steps, for example.
    unfinished = not (folder / RESULT).is_file() and _same_heads(config)
    if reasons and not (unfinished and has_checkpoint_of(config)):
        raise FileExistsError(
            f"{folder} has results of a run with {reasons[0]}: use --overwrite to replace them, or "
            "another output_dir"
        )


def _measure(
    config: TrainConfig, comparison: Comparison, console: Console, untrained: _Untrained
) -> None:
    """Train once, evaluate before and after on every data set, and write the result."""
    from dream_training.models.loading import make_retriever
    from dream_training.models.retriever import merged
    from dream_training.training.driver import train
    from dream_training.training.inputs import make_evaluator
    from dream_training.training.resuming import has_checkpoint_of

    model = make_retriever(config.retriever, config.lengths, config.run)
    evaluators = {}
    for folder in comparison.folders:
        wanted = replace(config.evaluation, eval_data=folder, eval_queries=None)
        evaluator = make_evaluator(wanted, config.run.seed)
        assert evaluator is not None
        evaluators[_short(folder)] = evaluator
    # Runs that differ only in how they train start from the same retriever.
    values = config.flat()
    start = tuple(str(values[key]) for key in _START)
    if config.retriever.lora_r:
        # An adapter begins as nothing: all seeds start from the same retriever.
        start = tuple(value for key, value in zip(_START, start) if key != "seed")
    before = untrained.setdefault(start, {})
    untouched = merged(model)
    for name, evaluator in evaluators.items():
        if name not in before:
            before[name] = evaluator(untouched)
    del untouched
    resume = has_checkpoint_of(config) and _same_heads(config)
    trained = train(
        config,
        model=model,
        console=console,
        evaluate_first=False,
        resume=resume,
        overwrite=not resume,
    )
    if trained.interrupted:
        raise KeyboardInterrupt
    # As it would be saved and loaded again.
    retriever = merged(trained.model)
    scores = {
        name: {"before": before[name][_METRIC], "after": evaluator(retriever)[_METRIC]}
        for name, evaluator in evaluators.items()
    }
    if not comparison.keep_models:
        for name in (BEST, LAST, CHECKPOINTS):
            shutil.rmtree(Path(config.output.output_dir) / name, ignore_errors=True)
    write_json(
        Path(config.output.output_dir) / RESULT,
        {
            "config": _identity(config),
            "data": _data_of(config, comparison),
            "evaluated": list(comparison.folders),
            "scores": scores,
            "seconds": trained.seconds,
        },
    )
    line = ", ".join(f"{name} {score['after']:.4f}" for name, score in scores.items())
    console.print(f"{Path(config.output.output_dir)}: nDCG@10 {line}")


def _short(folder: str) -> str:
    return Path(folder).resolve().name
