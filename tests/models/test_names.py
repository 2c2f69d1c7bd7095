"""Models that are missing or cannot be loaded: one line with key, name and remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.known_models import check_name
from dream_training.models.retriever import (
    build_retriever,
    load_sentence_transformer,
    save_retriever,
)
from dream_training.reading.reader import Reader
from dream_training.trust import load_language_model
from helpers.tiny import make_decoder, make_tokenizer


@pytest.mark.parametrize(
    "command, key",
    [
        ("train {config} reader=smolm2", "reader"),
        ("train {config} retriever=smolm2", "retriever"),
        ("train {config} reader=smolm2 --dry-run", "reader"),
        ("doctor {config} retriever=smolm2", "retriever"),
        ("doctor {config} reader=smolm2", "reader"),
        ("compare {config} retriever=smolm2", "retriever"),
        ("heads --reader smolm2 --data {data}", "reader"),
        ("evaluate smolm2 {beir}", "model"),
        ("mine {data} --output {folder}/m.jsonl --retriever smolm2", "retriever"),
        ("data targets {data} --output {folder}/t.jsonl --reader smolm2", "reader"),
        ("data stats {data} --reader smolm2", "reader"),
        ("data stats {data} --retriever smolm2", "retriever"),
        ("data prepare {data} --output {folder}/p.jsonl --tokenizer smolm2", "tokenizer"),
        ("demo --reader smolm2 --output-dir {folder}/demo", "reader"),
    ],
)
def test_every_command_names_key_and_nearest_model(
    run, tmp_path: Path, command: str, key: str
) -> None:
    settings = run()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings.flat()))
    places = {"config": config, "data": settings.train_data, "beir": settings.eval_data}
    arguments = [part.format(**places, folder=tmp_path) for part in command.split()]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, FileNotFoundError), result.output
    assert str(result.exception) == (
        f"{key}: there is neither a folder nor a known model 'smolm2'; did you mean 'smollm2'?"
    )
    for name in ("m.jsonl", "t.jsonl", "p.jsonl", "demo", "out/history.json", "out/config.json"):
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("load", (build_retriever, load_sentence_transformer, load_language_model))
def test_paths_and_names_of_the_hub(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load
) -> None:
    shutil.copytree(tiny_model, tmp_path / "my-reader")
    wrong = tmp_path / "my-raeder"
    with pytest.raises(FileNotFoundError) as caught:
        load(str(wrong))
    assert f"there is no folder '{wrong}'; did you mean '{tmp_path}/my-reader'?" in str(
        caught.value
    )
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="must be a folder or a name of the hub, got file"):
        load(str(tmp_path / "file"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it waits
    with pytest.raises(FileNotFoundError) as caught:
        load("meta-llama/Llama-3.2-1B-Instrct")
    text = str(caught.value)
    assert "there is no folder 'meta-llama/Llama-3.2-1B-Instrct' here, and it could not" in text
    assert text.endswith("did you mean 'meta-llama/Llama-3.2-1B-Instruct'?") and "\n" not in text


def test_names_that_may_be_of_the_hub_pass(tiny_model: Path) -> None:
    for name in ("gpt2", "bert-base-uncased", "Qwen/Qwen2.5-0.5B", str(tiny_model)):
        check_name(name, "reader")


def test_a_missing_package_of_a_quantised_model_is_named(tiny_model: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model, tmp_path / "model")
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "aqlm"}
    (path / "config.json").write_text(json.dumps(content))
    for key, load in (("reader", lambda p: Reader.from_pretrained(p, {0: [0]})),
                      ("retriever", build_retriever)):  # fmt: skip
        with pytest.raises(ModuleNotFoundError, match="needs a package that is missing") as caught:
            load(path)
        assert str(caught.value).startswith(f"{key} {path} needs")
        assert "aqlm" in str(caught.value).lower() and "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[ENTITY]", "[RELATION]"])
    make_decoder().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = (
        rf"{tmp_path}/model: its tokenizer has 2 tokens beyond the 259 rows of its embedding, such "
        r"as '\[ENTITY\]' \(259\): .* resize_token_embeddings\(261\)"
    )
    with pytest.raises(ValueError, match="reader " + message):
        Reader.from_pretrained(tmp_path / "model", {0: [0]})
    with pytest.raises(ValueError, match="retriever " + message):
        build_retriever(tmp_path / "model", device="cpu")
    # An added token that pads every batch is used, one of another modality is not.
    padded = make_tokenizer()
    padded.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = build_retriever(_saved(tmp_path / "image", padded), device="cpu", max_len=16)
    assert model.encode(["ab", "a"]).shape == (2, 32)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"has 1 tokens beyond .* '\[PAD\]' \(260\)"):
        build_retriever(_saved(tmp_path / "padded", padded), device="cpu")
    folder = save_retriever(model, tmp_path / "saved")
    padded.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model .*: its tokenizer has 1 tokens beyond"):
        load_sentence_transformer(folder, device="cpu")


def _saved(path: Path, tokenizer) -> Path:
    make_decoder().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
