"""``dream compare`` on tiny models."""

from __future__ import annotations

import io
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from dream_training.comparisons.objectives import (
    Row,
    comparison_tables,
    load_comparison,
    run_comparison,
)
from dream_training.plots import plot_comparison
from helpers.tiny import quiet


def write_config(run, path: Path, section: dict | None, **changes) -> Path:
    values = asdict(run(max_steps=1, eval_steps=9, **changes))
    path.write_text(yaml.safe_dump({**values, **({"compare": section} if section else {})}))
    return path


def test_every_objective_trains_on_the_same_data(run, tmp_path: Path) -> None:
    """The default comparison: five objectives, one seed; each changes the retriever."""
    config = write_config(run, tmp_path / "c.yaml", {"keep_models": False})
    comparison = load_comparison(config)
    rows = run_comparison(comparison, quiet())
    assert [row.name for row in rows] == ["dream", "infonce", "replug", "emdr", "revela"]
    out = tmp_path / "out"
    losses = {}
    for row in rows:
        assert list(row.scores) == ["beir"] and len(row.seconds) == 1
        history = json.loads((out / row.name / "seed0" / "history.json").read_text())
        losses[row.name] = history["steps"][0]["loss"]
        assert not (out / row.name / "seed0" / "last").exists()
    assert len(set(losses.values())) == 5
    # all start from the same retriever
    assert len({tuple(row.untrained["beir"]) for row in rows}) == 1
    table = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in table] == [row.name for row in rows]
    with Image.open(out / "comparison.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_runs_with_a_result_are_not_trained_again(run, tmp_path: Path, monkeypatch) -> None:
    runs = {"a": {"objective": "infonce"}, "b": {"objective": "infonce", "temperature": 0.2}}
    section = {"seeds": [3, 4], "runs": runs}
    config = write_config(run, tmp_path / "c.yaml", section)
    comparison = load_comparison(config)
    first = run_comparison(comparison, quiet(), only=["a"])
    assert [row.name for row in first] == ["a"] and len(first[0].seconds) == 2
    trained: list[str] = []

    def measured(config, comparison, console, untrained):
        trained.append(config.output_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr("dream_training.comparisons.objectives._measure", measured)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison, quiet())
    assert trained == [str(tmp_path / "out" / "b" / "seed3")]
    # other data is another result
    corpus = Path(comparison.folders[0]) / "corpus.jsonl"
    before = corpus.read_text()
    corpus.write_text(before.replace("apple", "plum"))
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        run_comparison(load_comparison(config), quiet(), only=["a"])
    assert trained == [str(tmp_path / "out" / "a" / "seed3")]
    corpus.write_text(before)
    # another setting is another result
    trained.clear()
    other = load_comparison(config, ["max_steps=2"])
    with pytest.raises(
        FileExistsError, match=r"a/seed3 has results of a run with max_steps 1, now 2"
    ):
        run_comparison(other, quiet(), only=["a"])
    assert not trained
    with pytest.raises(KeyboardInterrupt):
        run_comparison(other, quiet(), only=["a"], overwrite=True)
    assert trained == [str(tmp_path / "out" / "a" / "seed3")]


def test_infonce_takes_the_negatives_that_every_line_has() -> None:
    from datasets import Dataset

    from dream_training.objectives.build import labelled_columns

    data = Dataset.from_list(
        [
            {"query": "q1", "documents": ["a", "b", "c"], "positive": 1},
            {"query": "q2", "documents": ["d", "e"], "positive": 0},
            {"query": "q3", "documents": ["f"], "positive": -1},
        ]
    )
    assert labelled_columns(data).to_list() == [
        {"query": "q1", "positive": "b", "negative_1": "a"},
        {"query": "q2", "positive": "d", "negative_1": "e"},
    ]
    with pytest.raises(ValueError, match="needs known positives"):
        labelled_columns(data.select([2]))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"runs": {"a": {"objectiv": "dream"}}}, r"runs\.a: unknown key 'objectiv'.*'objective'"),
        ({"runs": {"a": {"objective": "x"}}}, "objective must be one of"),
        ({"runs": {"../a": {}}}, "name must do as a folder's name, got '../a'"),
        ({"runs": ["dream"]}, "must map names to keys and values"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"seed": [3]}, "has runs, seeds, evaluate, keep_models, got 'seed'"),
        ({"evaluate": "folder"}, "must be a list of folders, got 'folder'"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(run, tmp_path, section, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_comparison(write_config(run, tmp_path / "c.yaml", section))


def test_something_must_be_evaluated(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs eval_data"):
        load_comparison(write_config(run, tmp_path / "c.yaml", None, eval_data=None))


def test_an_unknown_run_is_named(run, tmp_path: Path) -> None:
    comparison = load_comparison(write_config(run, tmp_path / "c.yaml", None))
    with pytest.raises(ValueError, match="no run 'dreem', only dream, infonce"):
        run_comparison(comparison, quiet(), only=["dreem"])


def test_the_table_shows_mean_and_deviation(tmp_path: Path) -> None:
    values = [0.5, 0.6, 0.7]
    rows = [Row("dream", {"set": values}, {"set": [0.1] * 3}, [10.0, 30.0, 20.0])]
    console = Console(file=io.StringIO(), width=120)
    console.print(*comparison_tables(rows))
    text = console.file.getvalue()
    assert f"0.600 ± {statistics.stdev(values):.3f}" in text and "20" in text
    with pytest.raises(ValueError, match="at least one result"):
        plot_comparison({}, {}, tmp_path / "x.png")
