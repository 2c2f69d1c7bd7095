"""Several choices of heads compared from beginning to end: selected, measured, printed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from dream_kernels.files import is_stream
from dream_training.choices import HEAD_CRITERIA
from dream_training.comparisons.heads import (
    RANDOM,
    ComparedChoice,
    choose,
    measure,
    overlap,
    to_json,
    train_with,
    training_config,
    usable,
)
from dream_training.config import load_config
from dream_training.console import make_console, make_table, print_paths, show_on, shows_progress
from dream_training.heads.options import HeadOptions
from dream_training.heads.selection import head_examples
from dream_training.json_file import write_json
from dream_training.plots import plot_head_choices

_HELD_OUT = 32  # questions that the losses of a comparison are measured on


@shows_progress
def compare_heads(
    options: HeadOptions,
    folder: Path,
    criteria: Sequence[str],
    draws: int,
    train: Path | None,
    seeds: int,
    overwrite: bool = False,
) -> None:
    """Select heads by several criteria and at random, and show what each choice does.

    Writes the head files, ``comparison-top<k>.json`` and ``overlap-top<k>.png`` to ``folder``.

    Args:
        options: reader, data and how heads are selected.
        folder: for the results.
        criteria: all that the data allows if there are none.
        draws: how often heads are drawn at random.
        train: a config to train by with the heads of each choice; None to train nothing.
        seeds: trainings of each choice.
        overwrite: replace results of other settings.

    Raises:
        ValueError: ``folder`` is standard output, or the config has another reader.
    """
    if is_stream(folder):
        raise ValueError(f"--output must be a folder with --compare, got {folder}")
    console, top_k = show_on(make_console()), options.top_k
    training = None
    if train is not None:  # so that a mistake in it shows at once
        training = training_config(load_config(train), folder, top_k)
        if training.reader.model != options.reader:
            raise ValueError(
                f"{train}: the heads are those of reader {options.reader}, and the config trains "
                f"with {training.reader.model}"
            )
    data = options.read()
    labelled = sum(positive >= 0 for positive in data["positive"]) >= 2
    names = usable(criteria or HEAD_CRITERIA, labelled or bool(criteria))
    drawn = head_examples(data, options.examples + _HELD_OUT, options.seed, labelled=labelled)
    held_out = drawn[options.examples :]
    if len(held_out) < 2:
        console.print("too few lines to hold some out: the losses are those of the same lines")
        held_out = drawn
    reader = options.load_reader()
    choices = choose(
        reader,
        drawn[: options.examples],
        folder,
        criteria=names,
        draws=draws,
        options=options.selection(),
    )
    if labelled:
        measure(reader, choices, top_k, held_out)
    size = reader.model.config.get_text_config()
    del reader
    picture = plot_head_choices(
        {c.name: c.heads.heads[:top_k] for c in choices if not is_random(c)},
        [c.heads.heads[:top_k] for c in choices if is_random(c)],
        (size.num_hidden_layers, size.num_attention_heads),
        folder / f"overlap-top{top_k}.png",
    )
    result = folder / f"comparison-top{top_k}.json"
    write_json(result, to_json(choices, top_k))
    console.print(f"Heads in common: Jaccard index of the best {top_k}\n")
    console.print(overlap_table(choices, top_k))
    if training is not None:
        own = range(training.run.seed, training.run.seed + seeds)
        train_with(choices, training, top_k, own, console, overwrite)
        write_json(result, to_json(choices, top_k))
    console.print(f"\nThe best {top_k} heads of each choice\n")
    console.print(result_table(choices))
    console.print()
    print_paths(console, {"Who chose what:": picture, "All figures:": result})


def is_random(choice: ComparedChoice) -> bool:
    """Whether its heads were drawn at random."""
    return choice.heads.provenance["criterion"] == RANDOM


def overlap_table(choices: Sequence[ComparedChoice], top_k: int) -> Table:
    """Jaccard indices; the random draws are one column, their mean."""
    shared = overlap(choices, top_k)
    named = [choice.name for choice in choices if not is_random(choice)]
    draws = [choice.name for choice in choices if is_random(choice)]
    table = make_table("", *named, *(["random, mean"] if draws else []))
    for a in named:
        cells = [f"{shared[a][b]:.2f}" for b in named]
        if draws:
            cells.append(f"{statistics.mean(shared[a][b] for b in draws):.2f}")
        table.add_row(a, *cells)
    return table


def result_table(choices: Sequence[ComparedChoice]) -> Table:
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
    draws = [choice for choice in choices if is_random(choice)]
    if len(draws) > 1:
        table.add_row(f"all {len(draws)} random draws", *cells(draws))
    return table
