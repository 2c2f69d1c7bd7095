"""Taught once: the verdicts are those of the live loss, and training on them is the live run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dream_training.config import TrainConfig
from dream_training.data.taught_folder import taught_lines
from dream_training.objectives import build
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.reading.loading import load_reader
from dream_training.teaching import preparation
from dream_training.teaching.options import Candidates, Shard
from dream_training.teaching.teach import teach
from dream_training.training.driver import train
from helpers.objectives import make_retriever, split, with_candidates
from helpers.taught import Rows, rows_of, same_rows, teaching_config, write_rows
from helpers.tiny import make_rows, quiet, write_tiny_data


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    return teaching_config(tiny_model, tmp_path)


def live_verdicts(config: TrainConfig, tiny_model: Path, rows: Rows, pool: str) -> torch.Tensor:
    """What the loss computes in training for rows that are one batch."""
    model = make_retriever(tiny_model, torch.float32)
    heads = taught_lines(Path(config.output.output_dir))[0].heads
    reader = load_reader(config.reader, config.lengths, config.run, heads)
    return DistilledDreamLoss(model, reader).read(*split(DreamCollator(model, pool=pool)(rows)))


@pytest.mark.parametrize("pool", ("mined", "both"))
def test_the_verdicts_are_those_of_training(config, tiny_model: Path, pool: str) -> None:
    folder = Path(config.output.output_dir)
    config = config.with_changes(pool=pool)
    result = teach(config, folder, console=quiet())
    assert (result.lines, result.flat, result.absent, result.files) == (10, 0, 0, 1)
    given = {row["query"]: row for row in with_candidates(10)}
    taught = rows_of(folder)
    assert {row["query"] for row in taught} == given.keys() and len(taught) == 10
    for start in (0, 4):
        rows = taught[start : start + 4]
        live = live_verdicts(config, tiny_model, [given[row["query"]] for row in rows], pool)
        assert live.abs().max() > 0.1
        for row, logits in zip(rows, live, strict=True):
            own = given[row["query"]]
            size = len(row["documents"])
            torch.testing.assert_close(torch.tensor(row["logits"]), logits[:size])
            relevant = own["documents"][own["positive"]]
            assert row["documents"][row["positive"]] == relevant and row["target"] == own["target"]
            best = row["documents"][torch.tensor(row["logits"]).argmax()]
            assert row["positive_won"] == (best == relevant)
            assert row["origins"] == [
                "given" if text in own["documents"] else "batch" for text in row["documents"]
            ]
    names = [row["batch"] for row in taught]
    assert names == ([None] * 10 if pool == "mined" else ["0-0"] * 4 + ["0-1"] * 4 + ["0-2"] * 2)


@pytest.mark.parametrize("teacher_loss", ("kl", "margin"))
def test_training_on_it_is_the_live_run(config, tmp_path: Path, monkeypatch, teacher_loss) -> None:
    """Without a reader in memory; over epochs, with the losses and weights of a live run."""
    folder = tmp_path / "taught"
    teach(config, folder, console=quiet())
    config = config.with_changes(teacher_loss=teacher_loss)
    live = train(config.with_changes(output_dir=str(tmp_path / "live")), console=quiet())

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a reader is loaded")

    monkeypatch.setattr(build, "load_reader", never)
    keys = {key: value for key, value in config.flat().items() if key not in ("reader", "heads")}
    # Five steps of four lines of ten: three epochs.
    keys |= {"taught": str(folder), "train_data": str(folder)}
    taught = train(TrainConfig(**{**keys, "output_dir": str(tmp_path / "run")}), console=quiet())
    for name in ("loss", "entropy", "weight_on_positive"):
        first, second = ([s[name] for s in run.history.steps] for run in (live, taught))
        assert first == pytest.approx(second, rel=1e-6, abs=1e-6)
    assert len(taught.history.steps) == 5 and taught.history.steps[0]["loss"] > 1e-3
    weights = dict(live.model.named_parameters())
    for key, own in taught.model.named_parameters():
        torch.testing.assert_close(own, weights[key], rtol=1e-6, atol=1e-6)
    # Another seed and another retriever learn from the same folder.
    other = {**keys, "seed": 3, "retriever_layers": 1, "max_steps": 2}
    train(TrainConfig(**{**other, "output_dir": str(tmp_path / "other")}), console=quiet())


def test_a_shared_pool_stays_together(config, tiny_model: Path, tmp_path: Path) -> None:
    """Every step embeds the pool of one taught batch, in another order in each epoch."""
    data, _ = write_tiny_data(tmp_path, 14)
    config = config.with_changes(pool="both", train_data=str(data))
    folder = tmp_path / "taught"
    teach(config, folder, console=quiet())
    taught = config.with_changes(taught=str(folder), train_data=str(folder), max_steps=6)
    result = train(taught, console=quiet())
    assert [step["max_entropy"] for step in result.history.steps] == pytest.approx(
        [torch.tensor(4.0).log().item()] * 6
    )
    losses = [step["loss"] for step in result.history.steps]
    assert len(set(losses)) == 6


def test_candidates_are_mined_and_drawn(config, tmp_path: Path) -> None:
    """Each once, with where it comes from; the known positive is not mined again."""
    folder = tmp_path / "taught"
    data = write_rows(tmp_path / "one.jsonl", make_rows(12))
    config = config.with_changes(train_data=data)
    wanted = Candidates(bm25=2, retriever=2, from_batch=3)
    teach(config, folder, wanted, console=quiet())
    rows = rows_of(folder)
    assert len(rows) == 12
    mined = taught_lines(folder)[0].manifest["mined"]
    assert mined["batch"]["mined"] == 36 and mined["retriever"]["mined"] == 24
    assert mined["bm25"]["known_positives"] > 0
    for row, given in zip(rows, make_rows(12), strict=True):
        # BM25 finds nothing without a word in common.
        found = row["origins"].count("bm25")
        assert row["origins"] == ["given"] + ["bm25"] * found + ["retriever"] * 2 + ["batch"] * 3
        assert len(set(row["documents"])) == len(row["documents"]) and row["positive"] == 0
        assert row["documents"][0] == given["documents"][0]
    # Lines of one word rank high by it.
    apples = [row for row in rows if "apple" in row["query"]]
    assert len(apples) == 2 and all("apple" in row["documents"][1] for row in apples)
    assert len({tuple(row["documents"][-3:]) for row in rows}) > 1
    with pytest.raises(ValueError, match=r"bm25 is 0, and .* was taught with 2"):
        teach(config, folder, console=quiet())
    with pytest.raises(ValueError, match="--from-batch is for pool 'mined'"):
        teach(config.with_changes(pool="both"), folder, wanted, console=quiet())


def test_neighbours_share_a_batch(config, tmp_path: Path) -> None:
    words = ("apple", "river", "stone", "candle", "engine")
    rows = [
        {
            "query": f"what of the {word}",
            "target": f"{i}",
            "documents": [f"{word} {word} number {i}", "nothing at all"],
        }
        for i in (1, 2)
        for word in words
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    config, folder = config.with_changes(train_data=data, pool="both"), tmp_path / "taught"
    with pytest.raises(ValueError, match="batch_size must be a multiple of --neighbours 3, got 4"):
        teach(config, folder, Candidates(neighbours=3), console=quiet())
    mined = config.with_changes(pool="mined")
    with pytest.raises(ValueError, match="--neighbours is for pools of a batch"):
        teach(mined, folder, Candidates(neighbours=2), console=quiet())
    teach(config, folder, Candidates(neighbours=2), console=quiet())
    taught = rows_of(folder)
    assert [row["batch"] for row in taught] == ["0-0"] * 4 + ["0-1"] * 4 + ["0-2"] * 2
    queries = [row["query"] for row in taught]
    assert queries[::2] == queries[1::2] and len(set(queries)) == 5
    with pytest.raises(ValueError, match=r"neighbours is 0, and .* was taught with 2"):
        teach(config, folder, console=quiet())


def test_shards_together_are_the_whole(config, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    teach(config, alone, lines_per_file=4, console=quiet())
    counts = []
    for index in (1, 0, 1):
        result = teach(config, shared, lines_per_file=4, shard=Shard(index, 2), console=quiet())
        counts.append((result.lines, result.absent, result.files))
    assert counts == [(4, 2, 3), (6, 0, 3), (0, 0, 3)]
    # A document that is read in another batch is the same only up to rounding.
    same_rows(rows_of(alone), rows_of(shared))
    for text in ("2/2", "1", "a/b"):
        with pytest.raises(ValueError, match="shard must be"):
            Shard.parse(text)


def test_lines_are_appended(config, tmp_path: Path) -> None:
    folder, rows = tmp_path / "taught", with_candidates(10)
    first = config.with_changes(train_data=write_rows(tmp_path / "first.jsonl", rows[:6]))
    teach(first, folder, console=quiet())
    written = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    with pytest.raises(ValueError, match=r"4 of 10 lines .* was not taught with.*--append"):
        teach(config, folder, console=quiet())
    assert teach(config, folder, append=True, console=quiet()).lines == 4
    assert {path: path.read_bytes() for path in written} == written
    assert [row["query"] for row in rows_of(folder)] == [row["query"] for row in rows]
    assert teach(config, folder, append=True, console=quiet()).lines == 0
    assert teach(first, folder, console=quiet()).lines == 0


def test_documents_are_read_once(config, tmp_path: Path, monkeypatch) -> None:
    readers = []

    def loaded(*arguments, **options):
        readers.append(load_reader(*arguments, **options))
        return readers[-1]

    monkeypatch.setattr(preparation, "load_reader", loaded)
    teach(config, tmp_path / "taught", console=quiet())
    # Ten texts, most of them in several batches.
    assert readers[-1].store.misses == 10 and readers[-1].store.hits > 0
