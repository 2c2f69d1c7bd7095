"""Quantised readers: near the plain one, gradient in the scores too, or refused in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_training.config import TrainConfig
from dream_training.preflight.plan import make_plan
from dream_training.reading.quantization import bytes_of_weight
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from helpers.tiny import HEADS, make_decoder, make_tokenizer, quiet, save_decoder

DOCUMENTS = ["First document.", "Another, the second one", "x"]
PACKAGES = {"int8": "torchao", "bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes"}
LONG = {
    "int8": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
    "bnb-8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bnb-4bit": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    },
}  # fmt: skip
# Rounding errors of weights: of 8 bits about a hundredth, of 4 bits a tenth.
TOLERANCES = {"int8": 0.1, "bnb-8bit": 0.15, "bnb-4bit": 0.6}


def needs(choice: str) -> None:
    if importlib.util.find_spec(PACKAGES[choice]) is None:
        pytest.skip(f"{PACKAGES[choice]} is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 64 weights."""
    return save_decoder(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128)


def read(reader: Reader) -> tuple[float, torch.Tensor]:
    scores = torch.tensor([[0.3, -1.0, 0.5]], requires_grad=True)
    reading = reader(reader.read(DOCUMENTS), ["which one?"], ["the first"], scores)
    reading.loss.backward()
    assert scores.grad is not None
    return reading.loss.item(), scores.grad


@pytest.mark.parametrize("choice", PACKAGES)
def test_loss_and_gradient_are_near_the_plain_readers(
    folder: Path, tmp_path: Path, choice: str
) -> None:
    needs(choice)
    loss, gradient = read(Reader.from_pretrained(folder, HEADS))
    load = {"device": "cpu", "document_store": tmp_path / "store"}
    reader = Reader.from_pretrained(folder, HEADS, quantization=choice, **load)
    own_loss, own_gradient = read(reader)
    assert own_loss != loss, "nothing was quantised"
    assert own_loss == pytest.approx(loss, abs=TOLERANCES[choice])
    assert torch.cosine_similarity(own_gradient, gradient).item() > 1 - TOLERANCES[choice]
    # The same by the keys of transformers, and with the documents that the first one has read.
    other = Reader.from_pretrained(folder, HEADS, quantization=LONG[choice], **load)
    assert read(other)[0] == pytest.approx(own_loss, abs=1e-6)
    assert other.store is not None and (other.store.hits, other.store.misses) == (3, 0)
    plain = Reader.from_pretrained(folder, HEADS, document_store=tmp_path / "store")
    plain.read(DOCUMENTS)
    assert plain.store is not None and plain.store.hits == 0, "another reader"


@pytest.mark.parametrize("choice", PACKAGES)
def test_a_run_with_a_quantised_reader(folder: Path, run, choice: str) -> None:
    needs(choice)
    config = run(reader=str(folder), reader_quantization=choice, teaching="direct", max_steps=2)
    losses = [step["loss"] for step in train(config, console=quiet()).history.steps]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())


def test_what_cannot_quantise_is_refused_before_the_reader_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dream_training.trust as trust

    monkeypatch.setattr(trust, "load_language_model", lambda *_, **__: pytest.fail("loaded"))

    def message(choice: Any, path: Path = folder) -> str:
        with pytest.raises((ValueError, ModuleNotFoundError)) as caught:
            Reader.from_pretrained(path, HEADS, quantization=choice, device="cpu")
        assert "\n" not in str(caught.value) and "reader_quantization" in str(caught.value)
        return str(caught.value)

    assert "nonsense" in message({"quant_method": "nonsense"})
    # Needs a calibration, or a GPU, or a package: never the plain reader instead.
    for method in ("gptq", "awq", "eetq"):
        assert "cannot be used here" in message({"quant_method": method, "bits": 4})
    if importlib.util.find_spec("torchao") is not None:
        assert "it lacks the key 'quant_type'" in message({"quant_method": "torchao"})
        # The int4 products of torchao are those of GPUs.
        message({"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig"})
    stored = shutil.copytree(folder, tmp_path / "stored")
    content = json.loads((stored / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (stored / "config.json").write_text(json.dumps(content))
    assert "must be null" in message("int8", stored) and "(gptq)" in message("int8", stored)


def test_a_missing_package_is_named(folder: Path) -> None:
    for choice, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ModuleNotFoundError, match=f"reader_quantization .*{package}"):
                Reader.from_pretrained(folder, HEADS, quantization=choice, device="cpu")


@pytest.mark.parametrize("raises", [False, True])
def test_layers_without_a_gradient_are_named(monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    model = make_decoder()
    model.hf_quantizer = object()  # as a quantised model has
    layer = model.model.layers[1].mlp.up_proj
    forward = layer.forward

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return forward(states)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            raise NotImplementedError("no derivative for packed products")

    monkeypatch.setattr(layer, "forward", NoBackward.apply if raises else torch.no_grad()(forward))
    reader = Reader(model, make_tokenizer(), HEADS)
    prefix = reader.read(DOCUMENTS)
    # Without a gradient, as RePlug reads, it may be used.
    assert reader(prefix, ["q"], ["t"], torch.zeros(1, 3)).loss.isfinite()
    reason = "no derivative for packed" if raises else r"layers\.1\.mlp\.up_proj \(Linear\)"
    with pytest.raises(ValueError, match=f"let no gradient through, .*{reason}"):
        reader(prefix, ["q"], ["t"], torch.zeros(1, 3, requires_grad=True))


def test_the_plan_counts_what_quantised_weights_take(folder: Path, run) -> None:
    def weight_bytes(**keys: Any) -> int:
        return make_plan(run(reader=str(folder), dtype="float32", **keys)).weight_bytes

    decoder = (
        sum(
            p.numel()
            for p in make_decoder(hidden_size=64, intermediate_size=128).model.layers.parameters()
        )
        + 64
    )
    plain = weight_bytes()
    for choice, count in (("int8", 1), ("bnb-4bit", 0.5), (LONG["bnb-8bit"], 1)):
        saved = plain - weight_bytes(reader_quantization=choice)
        assert saved == int((4 - count) * decoder)
    assert bytes_of_weight({"quant_method": "quanto", "weights": "int4", "bits": 4}) == 0.5
    assert bytes_of_weight({"quant_method": "higgs"}) is None


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"reader_quantization": "int9"}, "must be one of int8, bnb-8bit, bnb-4bit or the keys of"),
        ({"reader_quantization": {"bits": 4}}, "must name a quant_method"),
        ({"reader_quantization": 8}, "must be dict or str or null"),
        ({"reader_quantization": "int8", "reader_sharding": "sharded"}, "must be null with reader"),
    ],
)
def test_the_config_key(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"reader_quantization {reason}"):
        TrainConfig(reader="r", train_data="d", **keys)
