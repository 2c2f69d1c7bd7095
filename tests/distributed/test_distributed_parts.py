"""Gathering, shares of a pool, evaluation, saving: each in two processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from dream_training.distributed import world
from dream_training.distributed.gather import gather_rows
from dream_training.distributed.pool import mean_over_ranks, share_of
from helpers.tiny import WORDS


def test_the_gradient_of_a_gathered_row_is_that_of_all_losses(two) -> None:
    """Weights 1, 2, 3 in the first process and 10, 20, 30 in the second."""
    (joined, first), (again, second) = two.run("gather_with_weights", [[1.0], [2.0, 3.0]])
    assert joined.tolist() == again.tolist() == [1.0, 2.0, 3.0]
    assert first.tolist() == [11.0]
    assert second.tolist() == [22.0, 33.0]


@pytest.mark.parametrize("lengths", ([3, 1, 2, 7, 1, 4], [2, 5]), ids=["all", "none of its own"])
@pytest.mark.parametrize("kind", ("pool", "each"))
def test_a_pool_read_in_shares_is_the_pool(two, kind: str, lengths: list[int]) -> None:
    for joined, whole in two.run("prefixes", kind, lengths):
        for found, expected in zip(joined[:2], whole[:2]):
            assert torch.equal(found, expected)
        for found, expected in zip(joined[2::2], whole[2::2]):
            assert (found is None) == (expected is None)
            assert expected is None or torch.equal(found, expected)
        kept = slice(None) if whole[2] is None else whole[2]
        for found, expected in zip(joined[3], whole[3]):
            found, expected = found.transpose(1, 2)[kept], expected.transpose(1, 2)[kept]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("documents,queries", [(13, 5), (1, 1)])
def test_evaluation_in_shares_finds_the_same(two, folder, documents: int, queries: int) -> None:
    corpus = {f"d{i}": f"{i} is the {WORDS[i % len(WORDS)]}" for i in range(documents)}
    asked = {f"q{i}": f"where is {WORDS[i]}" for i in range(queries)}
    for shared, alone in two.run("search_in_shares", folder, corpus, asked):
        assert shared.keys() == alone.keys() == asked.keys()
        for query, ranking in alone.items():
            assert list(shared[query]) == list(ranking)
            assert list(shared[query].values()) == pytest.approx(list(ranking.values()))


def test_a_sharded_retriever_is_saved_whole(two, folder, tmp_path: Path) -> None:
    expected = two.run("saved_from_shards", folder, str(tmp_path / "saved"))[0]
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = loaded.encode(["some text", "other"], convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_each_process_holds_its_part_of_a_sharded_reader(two, folder) -> None:
    (first, whole), (second, _) = two.run("reader_shards", folder)
    assert first + second == whole and abs(first - second) < 0.1 * whole


def test_all_processes_learn_what_process_0_finds_out(two) -> None:
    assert two.run("told_by_main", False) == [[0, 7], [0, 7]]
    first, second = two.run("told_by_main", True)
    assert first == "ValueError: no heads here"
    assert second == "RuntimeError: process 0 has failed: ValueError: no heads here"


def test_one_process_alone_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (world.rank(), world.size(), world.is_main()) == (0, 1, True)
    rows = torch.ones(3, 2)
    assert gather_rows(rows, [3]) is rows
    assert share_of(5) == range(5)
    assert world.join("cuda:1") == "cuda:1"
    assert mean_over_ranks({"a": 2.0, "b": 3.0}, {"a": 5.0, "c": 0.0}, "abc") == {
        "a": 2.0,
        "b": 3.0,
    }
    with pytest.raises(ValueError, match="counts must hold the rows of each of 1 processes"):
        gather_rows(rows, [2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or null"):
        world.join("cuda:1")
