"""Models from GGUF files, as folders that transformers loads fast.

Reading such a file takes many seconds and packed weights are slow, so the model is dequantised once
and kept as an ordinary transformers folder in the cache, which later calls reuse.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dream_kernels.files import whole_folder
from dream_training.console import progress
from dream_training.known_models import first_line, nearest
from dream_training.models.cache import DTYPES, cache_root, fastest_dtype, make_cache

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
INSTALL = "pip install gguf accelerate"
_MAGIC = b"GGUF"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# GGUF's type of control tokens, which are never made from text.
_CONTROL_TOKEN = 3


def find_gguf(path: str | os.PathLike[str], what: str = "model") -> Path | None:
    """Return the GGUF file that a model's name means; None if it is another kind of model.

    Args:
        path: a file whose name ends with ``.gguf``, or a folder with one and no other weights; any
            other folder or name of the hub gives None.
        what: the argument or config key that names it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, or a part of one; or the folder has several.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(file.glob(f"*{SUFFIX}"))
        if not found or any(file.glob("*.safetensors")) or (file / "modules.json").is_file():
            return None
        if len(found) > 1:
            names = ", ".join(own.name for own in found[:8])
            raise ValueError(f"{what}: {file} has {len(found)} GGUF files; name one: {names}")
        file = found[0]
    elif file.suffix.lower() != SUFFIX:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"{what}: there is no file {str(file)!r}{nearest(str(file))}")
    with file.open("rb") as stream:
        begin = stream.read(len(_MAGIC))
    if begin != _MAGIC:
        raise ValueError(f"{what}: {file} is not a GGUF file: it begins with {begin!r}")
    part = _PART.search(file.name)
    if part is not None and int(part[2]) > 1:
        raise ValueError(
            f"{what}: {file} is part {int(part[1])} of {int(part[2])}, which transformers does not "
            "read; join them with: llama-gguf-split --merge"
        )
    return file


def unpacked(
    path: str | os.PathLike[str], dtype: str | torch.dtype = "auto", what: str = "model"
) -> str:
    """Return the folder with the model of a GGUF file, made on the first call; else ``path``.

    The folder is in the cache, see :func:`~dream_training.models.cache.cache_root`, under the
    file's name, path, size and time of change: a file that changes is converted again.

    Args:
        path: as in :func:`find_gguf`.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for the one that this machine computes
            faster; any other is kept as float32.
        what: the argument or config key that names it.

    Raises:
        OSError: there is no such file, or the cache cannot be written.
        ModuleNotFoundError: a package that reads GGUF files is missing.
        ValueError: the file is not one that transformers can read.
    """
    file = find_gguf(path, what)
    if file is None:
        return os.fspath(path)
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = fastest_dtype(cache_root())
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    stem = re.sub(r"[^\w.-]+", "-", file.stem)[:80]
    kept = name if name in DTYPES else "float32"
    return str(converted_folder(file, f"gguf-{stem}-{digest}", kept, what))


def converted_folder(file: Path, name: str, dtype: str, what: str = "model") -> Path:
    """Return the folder of the cache with the model of a GGUF file, converted on the first call.

    Args:
        file: the GGUF file.
        name: of the folder, to which dtype and the version of transformers are added.
        dtype: of the weights, a key of :data:`~dream_training.models.cache.DTYPES`.
        what: the argument or config key that names the file.

    Raises:
        OSError: the cache cannot be written; the message names ``DREAM_CACHE``.
        ModuleNotFoundError: a package that reads GGUF files is missing.
        ValueError: transformers cannot read the file.
    """
    # transformers 5 writes a configuration that 4.57 misreads without an error (the rotary base
    # moved), so each major version has a folder of its own.
    major = transformers.__version__.split(".")[0]
    folder = cache_root() / f"{name}-{dtype}-transformers{major}"
    if not folder.is_dir():
        make_cache(folder.parent)
        # Conversion takes four bytes of memory a weight, which several processes may not have.
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                logger.info("converting %s to %s, once", file, folder)
                with (
                    progress(f"converting {file.name}, once"),
                    whole_folder(folder, replace=False) as target,
                ):
                    _convert(file, target, DTYPES[dtype], what)
    return folder


def _convert(file: Path, folder: Path, dtype: torch.dtype, what: str) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what}: reading {file.name} needs {' and '.join(missing)}; install with: {INSTALL}"
        )
    try:
        # Alone in a folder: the files beside it may be of other models, and may hold code.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / file.name).symlink_to(file.resolve())
            model, tokenizer, lacking = _load(Path(alone) / file.name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{what}: reading {file.name} needs a package that is missing: {first_line(error)}"
        ) from error
    except Exception as error:  # whatever a broken file makes the parser do
        reason = first_line(error) if str(error) else type(error).__name__
        raise ValueError(
            f"{what}: transformers {transformers.__version__} cannot read {file}: {reason}"
        ) from error
    if lacking:  # they would be random
        raise ValueError(f"{what}: {file} lacks {len(lacking)} weights, such as {lacking[0]}")
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(file: Path) -> tuple[Any, Any, list[str]]:
    """Model in float32, tokenizer, and the names of weights that the file does not have."""
    from gguf import GGUFReader

    # Its folder and name are two arguments of transformers.
    folder: Any = str(file.parent)
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    dequantised = {}
    # Before 5.0 a GGUF file was always dequantised and the option did not exist.
    if hasattr(transformers, "GgufConfig"):
        dequantised["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options, **dequantised
    )
    model, information = loaded
    fields = GGUFReader(file).fields
    keys = [fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    tokenizer: Any
    if [key and key.contents() for key in keys] == ["gpt2", "smollm"]:
        tokenizer = _smollm_tokenizer(fields, model.config.max_position_embeddings)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return model, tokenizer, sorted(information["missing_keys"])


def _smollm_tokenizer(fields: Any, max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer of the pre-tokenizer ``smollm``.

    transformers' own conversion is not exact for it. 4.57 prepends ``<|im_start|>``, takes it for
    the end token too and has no padding token; both 4.57 and 5.x leave out the split of digits that
    ``smollm`` implies, which changes runs of spaces before a number.
    """

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

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
