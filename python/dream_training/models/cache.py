"""The folder for what is kept between runs, and the dtype that models are kept in there."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

from dream_kernels.files import write_text
from dream_training.console import progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """Measure which dtype runs a small model's layers faster on the CPU, in well under 3 seconds.

    A forward and backward pass of SmolLM2's layers is timed, not a bare matrix product:
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


def fastest_dtype(cache: Path) -> str:
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
