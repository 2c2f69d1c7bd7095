"""The document store: same results, bounded, atomic, and no trust in its files."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from dream_training.config import TrainConfig
from dream_training.reading.document_store import DiskStore, MemoryStore, model_identity
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from helpers.tiny import HEADS, make_decoder, make_rows, make_tokenizer

DOCUMENTS = ["First document.", "Ünïcödé, the second\none", "x", "a fourth, longer than the others"]
STATES = torch.arange(2400, dtype=torch.float32).view(3, 2, 2, 5, 40)
DOCUMENT = [5, 6, 7, 8, 9]


def make_reader(dtype: torch.dtype = torch.float32, **options) -> Reader:
    return Reader(make_decoder().to(dtype), make_tokenizer(), HEADS, **options)


@pytest.fixture(params=("memory", "folder"))
def choice(request, tmp_path):
    return "memory" if request.param == "memory" else tmp_path / "store"


@pytest.fixture(params=("memory", "disk"))
def make_store(request, tmp_path):
    if request.param == "memory":
        return lambda max_bytes: MemoryStore("me", max_bytes)
    return lambda max_bytes: DiskStore(tmp_path / "store", "me", max_bytes)


def assert_same(prefix, expected, **tolerance) -> None:
    for layer, expected_layer in zip(prefix.layers, expected.layers, strict=True):
        for states, expected_states in zip(layer, expected_layer):
            torch.testing.assert_close(states, expected_states, **tolerance)
    assert torch.equal(prefix.spans, expected.spans)
    assert torch.equal(prefix.next_position, expected.next_position)
    assert (prefix.mask is None) == (expected.mask is None)
    assert prefix.mask is None or torch.equal(prefix.mask, expected.mask)


@pytest.mark.parametrize("pools", (None, [[0, 2], [1, 0, 3]]), ids=("shared", "per query"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_reading_from_the_store_is_the_same_bit_for_bit(choice, pools, dtype) -> None:
    expected = make_reader(dtype).read(DOCUMENTS, pools)
    reader = make_reader(dtype, document_store=choice)
    for hits in (0, 4, 8):
        assert_same(reader.read(DOCUMENTS, pools), expected, rtol=0, atol=0)
        assert (reader.store.hits, reader.store.misses) == (hits, 4)


def test_documents_read_in_other_batches_differ_only_by_rounding(choice) -> None:
    """Matrix products of other shapes round differently; nothing else may differ."""
    reader = make_reader(torch.float64, document_store=choice)
    reader.read(DOCUMENTS[:1])
    prefix = reader.read(DOCUMENTS)
    assert (reader.store.hits, reader.store.misses) == (1, 4)
    expected = make_reader(torch.float64).read(DOCUMENTS)
    assert_same(prefix, expected, rtol=1e-11, atol=1e-11)
    scores = torch.randn(1, 4, requires_grad=True)
    for own in (prefix, expected):
        reader(own, ["which?"], ["this"], scores).loss.backward()
        gradient, scores.grad = scores.grad, None
        assert gradient.abs().max() > 1e-4


def test_a_later_run_finds_what_an_earlier_one_read(tmp_path) -> None:
    expected = make_reader(document_store=tmp_path).read(DOCUMENTS)
    later = make_reader(document_store=tmp_path)
    later.model.base_model.forward = None  # not even the header is read again
    assert_same(later.read(DOCUMENTS), expected, rtol=0, atol=0)
    assert (later.store.hits, later.store.misses) == (4, 0)


def test_only_a_missing_header_is_read_again(tmp_path) -> None:
    reader = make_reader(document_store=tmp_path)
    expected = reader.read(DOCUMENTS)
    reader.store._path(reader.store._name(reader.tokens.header, ())).unlink()
    assert_same(reader.read(DOCUMENTS), expected, rtol=1e-5, atol=1e-5)
    assert reader.store.misses == 4 and reader.store.get(reader.tokens.header, ()) is not None


def test_other_readers_and_other_prompts_find_nothing(tmp_path) -> None:
    make_reader(document_store=tmp_path).read(DOCUMENTS)
    changed = make_decoder()
    changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    others = [
        make_reader(torch.bfloat16, document_store=tmp_path),
        Reader(changed, make_tokenizer(), HEADS, document_store=tmp_path),
        Reader(make_decoder(rms_norm_eps=1e-4), make_tokenizer(), HEADS, document_store=tmp_path),
    ]
    for reader in others:
        reader.read(DOCUMENTS)
        assert (reader.store.hits, reader.store.misses) == (0, 4)
    header = make_reader(document_store=tmp_path)
    header.tokens.header = header.tokens.header[:-1]
    header.read(DOCUMENTS)
    assert header.store.hits == 0


def test_the_identity_is_of_what_the_model_computes() -> None:
    model = make_decoder()
    identity = model_identity(model)
    assert model_identity(make_decoder()) == identity
    model.config._name_or_path = "elsewhere"
    reader = Reader(model, make_tokenizer(), HEADS)
    assert model_identity(reader.model) == identity
    assert model_identity(make_decoder().double()) != identity


def test_the_least_recently_used_is_evicted_first(make_store) -> None:
    store = make_store(3 * STATES.nbytes + 1200)  # a file has a header of about 200 bytes
    for token in range(3):
        store.put([1], [token] * 5, STATES + token)
    assert len(store) == 3 and store.get([1], [0] * 5) is not None
    store.put([1], [3] * 5, STATES)
    store.put([1], [4] * 5, STATES)
    kept = [token for token in range(5) if store.get([1], [token] * 5) is not None]
    assert kept == [0, 3, 4] and len(store) == 3
    assert store.bytes <= store.max_bytes
    assert torch.equal(store.get([1], [0] * 5), STATES)
    store.put([1], [9] * 5, STATES.repeat(1, 1, 1, 1, 9))
    assert len(store) == 3, "what is larger than the store must not empty it"


def test_a_folder_remembers_what_was_used(tmp_path) -> None:
    store = DiskStore(tmp_path, "me", 10**6)
    for token in range(3):
        store.put([1], [token] * 5, STATES)
        path = store._path(store._name([1], [token] * 5))
        os.utime(path, (1000.0 + token, 1000.0 + token))
    assert store.get([1], [0] * 5) is not None  # now the newest
    later = DiskStore(tmp_path, "me", store.bytes)
    assert later.bytes == store.bytes and len(later) == 3
    later.put([1], [3] * 5, STATES)
    assert [t for t in range(4) if later.get([1], [t] * 5) is not None] == [0, 2, 3]


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def rename_inside(path) -> None:
    save_file(load_file(path), path, {"format": "dream-kernels document 1", "name": "other"})


def write_foreign(path) -> None:
    save_file({"weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    "damage, reason",
    (
        (flip, "check sum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "refused"),
        (lambda path: path.write_bytes(b"not safetensors"), "refused"),
        (rename_inside, "not written for this document"),
        (write_foreign, "refused"),
    ),
    ids=("flipped bit", "cut off", "text", "renamed", "foreign"),
)
def test_damaged_and_foreign_files_are_refused(tmp_path, caplog, damage, reason: str) -> None:
    reader = make_reader(document_store=tmp_path)
    expected = reader.read(DOCUMENTS)
    tokens = reader.tokens.documents([DOCUMENTS[1]])[0]
    path = reader.store._path(reader.store._name(reader.tokens.header, tokens))
    whole = path.read_bytes()
    damage(path)
    later = make_reader(document_store=tmp_path)
    assert_same(later.read(DOCUMENTS), expected, rtol=1e-5, atol=1e-5)
    assert (later.store.hits, later.store.misses) == (3, 1)
    assert reason in caplog.text and path.name in caplog.text
    assert len(path.read_bytes()) == len(whole)
    assert make_reader(document_store=tmp_path).store.get(reader.tokens.header, tokens) is not None


def test_a_killed_writer_leaves_no_file_that_counts(tmp_path, monkeypatch) -> None:
    store = DiskStore(tmp_path, "me", 10**6)

    def replace(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    # A killed writer cleans nothing up.
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        store.put([1], DOCUMENT, STATES)
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp"
    assert len(DiskStore(tmp_path, "me", 10**6)) == 0 and left.exists()
    os.utime(left, (time.time() - 7200,) * 2)
    assert DiskStore(tmp_path, "me", 10**6).get([1], DOCUMENT) is None
    assert not left.exists()


def test_two_runs_share_a_folder(tmp_path) -> None:
    first, second = (DiskStore(tmp_path, "me", 10**6) for _ in range(2))
    first.put([1], DOCUMENT, STATES)
    assert torch.equal(second.get([1], DOCUMENT), STATES)
    assert second.bytes == first.bytes
    second._forget(name := second._name([1], DOCUMENT))
    second._delete(name)
    assert first.get([1], DOCUMENT) is None and first.bytes == 0
    assert DiskStore(tmp_path, "you", 10**6).get([1], DOCUMENT) is None


def test_every_epoch_after_the_first_reads_from_the_store(tiny_model, tmp_path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, make_rows(8))))

    def run(store: str | None) -> list[dict]:
        config = TrainConfig(
            reader=str(tiny_model), retriever=str(tiny_model), retriever_layers=1, lora_r=2,
            train_data=str(data), top_k=4, batch_size=4, max_steps=6, device="cpu", log_steps=1,
            document_store=store, report_queries=0, output_dir=str(tmp_path / "out"),
        )  # fmt: skip
        console = Console(file=io.StringIO(), width=200)
        steps = train(config, console=console, overwrite=True).history.steps
        assert ("store 4/4" in console.file.getvalue()) == (store is not None)
        return steps

    plain, kept = run(None), run("memory")
    assert [s["store_hits"] for s in kept] == [0, 0, 4, 4, 4, 4]
    assert [s["store_misses"] for s in kept] == [4, 4, 0, 0, 0, 0]
    assert "store_hits" not in plain[0]
    assert [s["loss"] for s in kept] == pytest.approx([s["loss"] for s in plain], rel=1e-4)


def test_mistakes_are_named(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"must be a folder, got the file .*file"):
        make_reader(document_store=tmp_path / "file")
    with pytest.raises(ValueError, match=r"'independent': .* got 'memory' with context 'joint'"):
        make_reader(document_store="memory", context="joint")
    with pytest.raises(ValueError, match="document_store_gb must be positive, got 0"):
        make_reader(document_store="memory", document_store_gb=0)
    with pytest.raises(ValueError, match="max_bytes must be positive, got -1"):
        MemoryStore("me", -1)
