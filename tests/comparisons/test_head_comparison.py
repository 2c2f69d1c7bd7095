"""Choices of heads side by side: overlap, losses, training runs, and what is not done twice."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from dream_kernels import HeadFile, read_heads
from dream_training.cli import app
from dream_training.comparisons import heads as comparison
from dream_training.comparisons.heads import ComparedChoice, choose, measure, overlap
from dream_training.heads.contrast import measure_contrast
from dream_training.heads.selection import HeadExample
from dream_training.plots import plot_head_choices
from dream_training.reading.reader import Reader
from helpers.tiny import make_decoder, make_rows, make_tokenizer

pytestmark = pytest.mark.long

EXAMPLES = [HeadExample(r["query"], r["target"], tuple(r["documents"]), 0) for r in make_rows(6)]
OPTIONS = {"pool_size": 3, "reader_name": "tiny", "data_name": "rows"}


def make_choices(
    reader: Reader, folder: Path, examples=EXAMPLES, **changes
) -> list[ComparedChoice]:
    return choose(
        reader,
        examples,
        folder,
        criteria=("qr_mass", "loss_gradient", "random"),
        draws=2,
        options={**OPTIONS, **changes},
    )


@pytest.fixture
def reader() -> Reader:
    return Reader(make_decoder(), make_tokenizer(), {0: [1]})


def test_what_was_chosen_with_the_same_options_is_not_chosen_again(
    reader: Reader, tmp_path: Path, monkeypatch
) -> None:
    first = make_choices(reader, tmp_path)
    assert [c.name for c in first] == ["qr_mass", "loss_gradient", "random-0", "random-1"]
    assert all(read_heads(c.path) == c.heads for c in first)
    made = []
    original = comparison.select_heads

    def select(*args, **options):
        made.append(options["criterion"])
        return original(*args, **options)

    monkeypatch.setattr(comparison, "select_heads", select)
    again = make_choices(reader, tmp_path)
    assert made == [] and [c.heads for c in again] == [c.heads for c in first]
    make_choices(reader, tmp_path, pool_size=2)
    assert made == ["qr_mass", "loss_gradient"], "random heads depend on no pool"
    made.clear()
    make_choices(reader, tmp_path, pool_size=2, null_query="What?")
    assert made == ["qr_mass"], "the gradient asks no null query"
    made.clear()
    others = [*EXAMPLES[:-1], replace(EXAMPLES[-1], query="Which one?")]
    make_choices(reader, tmp_path, others, pool_size=2, null_query="What?")
    assert made == ["qr_mass", "loss_gradient"], "random heads look at no example"
    made.clear()
    make_choices(reader, tmp_path, others, pool_size=2, null_query="What?", reader_name="another")
    assert made == ["qr_mass", "loss_gradient", "random", "random"]


def test_the_overlap_is_the_jaccard_index(tmp_path: Path) -> None:
    orders = {"a": [(0, 0), (0, 1), (1, 0)], "b": [(0, 1), (1, 1), (0, 0)]}
    choices = [ComparedChoice(n, HeadFile(h), tmp_path / n) for n, h in orders.items()]
    assert overlap(choices, 2) == {"a": {"a": 1.0, "b": 1 / 3}, "b": {"a": 1 / 3, "b": 1.0}}
    assert overlap(choices, 3)["a"]["b"] == 0.5


def test_losses_are_measured_with_the_heads_of_each_choice(reader: Reader, tmp_path: Path) -> None:
    choices = make_choices(reader, tmp_path)
    measure(reader, choices, 3, EXAMPLES)
    assert reader.injection.heads == {0: [1]}, "the reader's own heads come back"
    for choice in choices:
        own = Reader(make_decoder(), make_tokenizer(), choice.heads.by_layer(3))
        expected = measure_contrast(own, EXAMPLES)
        torch.testing.assert_close(choice.contrast.right, expected.right)
        torch.testing.assert_close(choice.contrast.wrong, expected.wrong)
    assert len({choice.contrast.means()["right"] for choice in choices}) == len(choices)


def test_the_picture_shows_every_choice(tmp_path: Path) -> None:
    chosen = {"qr_mass": [(0, 1), (2, 3)], "loss_gradient": [(2, 3), (1, 1)]}
    path = plot_head_choices(chosen, [[(0, 0), (1, 2)]], (3, 4), tmp_path / "map.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for color in ((0x1B, 0x4F, 0x8A), (0xD0, 0x8A, 0x3A)):
        assert (pixels == color).all(1).sum() > 50
    with pytest.raises(ValueError, match="at most 4 criteria can be drawn, got 5"):
        plot_head_choices({str(i): [] for i in range(5)}, [], (3, 4), path)


def test_the_command_compares_trains_and_resumes(run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    settings = run(max_steps=1, eval_steps=1)
    config.write_text(yaml.safe_dump(asdict(settings)))
    folder = tmp_path / "choices"

    def compare(*more: str):
        return CliRunner().invoke(
            app,
            ["heads", "--compare", "--reader", settings.reader.model, "--data", settings.train_data,
             "--output", str(folder), "--top-k", "3", "--pool-size", "4", "--examples", "8",
             "--criterion", "qr_mass", "--criterion", "random", "--draws", "2", *more],
        )  # fmt: skip

    result = compare("--train", str(config), "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "all 2 random draws" in result.output and "random, mean" in result.output
    found = json.loads((folder / "comparison-top3.json").read_text())
    assert [c["name"] for c in found["choices"]] == ["qr_mass", "random-0", "random-1"]
    for choice in found["choices"]:
        assert len(choice["heads"]) == 3 and choice["losses"]["queries"] == 16
        assert [len(scores) for scores in choice["ndcg_at_10"].values()] == [2]
    assert (folder / "overlap-top3.png").stat().st_size > 5000
    results = sorted(folder.glob("training-top3/*/*/result.json"))
    assert len(results) == 6
    assert not list(folder.glob("training-top3/*/*/last")), "models are not kept"
    times = [path.stat().st_mtime_ns for path in results]
    assert compare("--train", str(config), "--seeds", "2").exit_code == 0
    assert [path.stat().st_mtime_ns for path in results] == times, "trained again"


def test_the_command_ranks_by_one_criterion(run, tmp_path: Path) -> None:
    settings = run()
    common = [
        "heads",
        "--reader",
        settings.reader.model,
        "--data",
        settings.train_data,
        "--top-k",
        "2",
    ]
    output = tmp_path / "own.yaml"
    result = CliRunner().invoke(
        app, [*common, "--criterion", "loss_gradient", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert "The loss prefers the document known to be relevant in " in result.output
    made = read_heads(output)
    assert made.provenance["criterion"] == "loss_gradient" and made.provenance["point"] == "own"
    assert (tmp_path / "own.png").stat().st_size > 5000
    result = CliRunner().invoke(app, [*common, "--criterion", "random", "--output", str(output)])
    assert result.exit_code == 0 and "Their map" not in result.output
    assert read_heads(output).scores == {}


def test_the_command_takes_targets_from_the_documents(run, tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "heads.yaml"
    rows = [{key: row[key] for key in ("query", "documents", "positive")} for row in make_rows(8)]
    data.write_text("\n".join(json.dumps({**row, "positive": True}) for row in rows))
    command = [
        "heads",
        "--reader",
        run().reader.model,
        "--data",
        str(data),
        "--output",
        str(output),
    ]
    result = CliRunner().invoke(app, command)
    assert "target" in str(result.exception)
    result = CliRunner().invoke(app, [*command, "--target-from", "positive"])
    assert result.exit_code == 0, result.output
    assert read_heads(output).provenance["data"] == f"{data}, target_from positive"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--criterion", "qr_mass", "--criterion", "random"], "several criteria need --compare"),
        (["--criterion", "best"], "criterion must be one of"),
    ],
)
def test_mistakes_are_named(run, arguments: list[str], message: str) -> None:
    settings = run()
    result = CliRunner().invoke(
        app, ["heads", "--reader", settings.reader.model, "--data", settings.train_data, *arguments]
    )
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_a_run_with_another_reader_is_refused(run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(asdict(run())))
    result = CliRunner().invoke(
        app,
        ["heads", "--compare", "--reader", "smollm2", "--data", run().train_data,
         "--train", str(config), "--output", str(tmp_path / "choices")],
    )  # fmt: skip
    assert "the config trains with" in str(result.exception)
