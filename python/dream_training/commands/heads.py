"""``dream heads``: select, write, draw and compare the reader's heads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dream_kernels import write_heads
from dream_kernels.files import is_stream
from dream_kernels.head_file import head_name
from dream_training.choices import HEAD_CRITERIA
from dream_training.comparisons import heads as comparison
from dream_training.comparisons.heads import RANDOM, ComparedChoice
from dream_training.config import TrainConfig, load_config
from dream_training.console import make_console, make_table, print_paths, show_on, shows_progress
from dream_training.data.jsonl import read_training_data
from dream_training.heads.selection import WITHOUT_LABELS, head_examples, select_heads
from dream_training.json_file import write_json
from dream_training.plots import plot_head_choices, plot_heads
from dream_training.reading.loading import load_reader

if TYPE_CHECKING:
    from datasets import Dataset

_HELD_OUT = 32  # questions that the losses of a comparison are measured on


@dataclass(frozen=True)
class HeadOptions:
    """The options of the command; see ``dream heads --help``."""

    reader: str
    data: str
    top_k: int
    examples: int
    pool_size: int
    context: str
    passage_max_len: int
    null_query: str
    token_filter: bool
    point: str
    seed: int
    split: str = "train"
    target_from: str | None = None
    trust_remote_code: bool = False

    def read(self) -> Dataset:
        """The training data."""
        return read_training_data(self.data, split=self.split, target_from=self.target_from)

    def config(self) -> TrainConfig:
        """As far as the reader is concerned."""
        return TrainConfig(
            reader=self.reader,
            train_data=self.data,
            context=self.context,
            passage_max_len=self.passage_max_len,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
        )

    def selection(self) -> dict[str, Any]:
        """The arguments of :func:`select_heads`."""
        return {
            "pool_size": self.pool_size,
            "null_query": self.null_query,
            "token_filter": self.token_filter,
            "point": self.point,
            "data_name": self._data_name(),
            "reader_name": self.reader,
        }

    def _data_name(self) -> str:
        """The data with what is read of it: another split or other targets give other heads."""
        name = self.data
        if self.split != "train":
            name += f", split {self.split}"
        if self.target_from is not None:
            name += f", target_from {self.target_from}"
        return name


@shows_progress
def run_heads(options: HeadOptions, output: Path, criterion: str) -> None:
    """Select heads by one criterion; write, draw and print them."""
    console = show_on(make_console(beside=output))
    examples = head_examples(
        options.read(),
        options.examples,
        options.seed,
        labelled=criterion not in WITHOUT_LABELS,
    )
    head_file = select_heads(
        load_reader(options.config(), {}),
        examples,
        criterion=criterion,
        seed=options.seed,
        **options.selection(),
    )
    head_file = head_file.choose(min(options.top_k, len(head_file.heads)))
    write_heads(output, head_file)
    console.print(f"{'rank':>4}  {'head':>6}  {'score' if head_file.scores else ''}".rstrip())
    for rank, head in enumerate(head_file.heads[: head_file.chosen], 1):
        score = f"  {head_file.scores[head]:.4f}" if head_file.scores else ""
        console.print(f"{rank:>4}  {head_name(*head):>6}{score}")
    console.print()
    ranked = " and the scores of all" if head_file.scores else ""
    paths = {f"These {head_file.chosen} of {len(head_file.heads)} heads{ranked}:": output}
    if head_file.scores and not is_stream(output):
        paths["Their map:"] = plot_heads(head_file, output.with_suffix(".png"))
    print_paths(console, paths)
    preferred = head_file.provenance.get("prefers_the_positive")
    if preferred is not None:
        console.print(f"The loss prefers the document known to be relevant in {preferred:.0%}.")


@shows_progress
def run_head_comparison(
    options: HeadOptions,
    folder: Path,
    *,
    criteria: Sequence[str],
    draws: int,
    train: Path | None,
    seeds: int,
    overwrite: bool = False,
) -> None:
    """Select heads by several criteria and at random, and show what each choice does.

    Writes the head files, ``comparison-top<k>.json`` and ``overlap-top<k>.png`` to ``folder``.
    """
    if is_stream(folder):
        raise ValueError(f"--output must be a folder with --compare, got {folder}")
    console, top_k = show_on(make_console()), options.top_k
    training = None
    if train is not None:  # a mistake in it shall show at once
        training = comparison.training_config(load_config(train), folder, top_k)
        if training.reader != options.reader:
            raise ValueError(
                f"{train}: the heads are those of reader {options.reader}, and the config trains "
                f"with {training.reader}"
            )
    data = options.read()
    labelled = sum(positive >= 0 for positive in data["positive"]) >= 2
    names = comparison.usable(criteria or HEAD_CRITERIA, labelled or bool(criteria))
    drawn = head_examples(data, options.examples + _HELD_OUT, options.seed, labelled=labelled)
    held_out = drawn[options.examples :]
    if len(held_out) < 2:
        console.print("too few lines to hold some out: the losses are those of the same lines")
        held_out = drawn
    reader = load_reader(options.config(), {})
    choices = comparison.choose(
        reader,
        drawn[: options.examples],
        folder,
        criteria=names,
        draws=draws,
        options=options.selection(),
    )
    if labelled:
        comparison.measure(reader, choices, top_k, held_out)
    size = reader.model.config.get_text_config()
    del reader
    picture = plot_head_choices(
        {c.name: c.heads.heads[:top_k] for c in choices if not _is_random(c)},
        [c.heads.heads[:top_k] for c in choices if _is_random(c)],
        (size.num_hidden_layers, size.num_attention_heads),
        folder / f"overlap-top{top_k}.png",
    )
    result = folder / f"comparison-top{top_k}.json"
    write_json(result, comparison.to_json(choices, top_k))
    console.print(f"Heads in common: Jaccard index of the best {top_k}\n")
    console.print(_overlap_table(choices, top_k))
    if training is not None:
        own = range(training.seed, training.seed + seeds)
        comparison.train_with(choices, training, top_k, own, console, overwrite)
        write_json(result, comparison.to_json(choices, top_k))
    console.print(f"\nThe best {top_k} heads of each choice\n")
    console.print(_result_table(choices))
    console.print()
    print_paths(console, {"Who chose what:": picture, "All figures:": result})


def _is_random(choice: ComparedChoice) -> bool:
    return choice.heads.provenance["criterion"] == RANDOM


def _overlap_table(choices: Sequence[ComparedChoice], top_k: int) -> Table:
    """Jaccard indices; the random draws are one column, their mean."""
    shared = comparison.overlap(choices, top_k)
    named = [choice.name for choice in choices if not _is_random(choice)]
    draws = [choice.name for choice in choices if _is_random(choice)]
    table = make_table("", *named, *(["random, mean"] if draws else []))
    for a in named:
        cells = [f"{shared[a][b]:.2f}" for b in named]
        if draws:
            cells.append(f"{statistics.mean(shared[a][b] for b in draws):.2f}")
        table.add_row(a, *cells)
    return table


def _result_table(choices: Sequence[ComparedChoice]) -> Table:
    """Losses and training results of every choice, and of all random draws together."""
    measured = any(choice.contrast is not None for choice in choices)
    losses = ("right", "uniform", "wrong", "wrong - right") if measured else ()
    trained = list(dict.fromkeys(name for choice in choices for name in choice.training))
    heads = [f"loss\n{name}" for name in losses] + [f"nDCG@10\n{name}" for name in trained]
    table = make_table("heads", *heads)

    def cells(group: Sequence[ComparedChoice]) -> list[str]:
        out = []
        if measured:
            means = [c.contrast.means() for c in group if c.contrast is not None]
            mean = {key: statistics.mean(m[key] for m in means) for key in means[0]}
            out += [f"{mean[key]:.3f}" for key in ("right", "uniform", "wrong")]
            out.append(f"{mean['wrong'] - mean['right']:.3f}")
        for name in trained:
            scores = [score for c in group for score in c.training.get(name, [])]
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            out.append(f"{statistics.mean(scores):.3f}{spread}" if scores else "-")
        return out

    for choice in choices:
        table.add_row(choice.name, *cells([choice]))
    draws = [choice for choice in choices if _is_random(choice)]
    if len(draws) > 1:
        table.add_row(f"all {len(draws)} random draws", *cells(draws))
    return table
