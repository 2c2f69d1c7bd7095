"""Readers whose weights are quantised while they are loaded, by transformers' own methods."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_kernels.injection.support import backbone_of
from dream_kernels.parsing import shortened
from dream_training.choices import READER_QUANTIZATIONS
from dream_training.known_models import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = "reader_quantization"
_SHORT: dict[str, dict[str, Any]] = dict(
    zip(
        READER_QUANTIZATIONS,
        (
            {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ),
        strict=True,
    )
)
# Of a layer that any method divides into its blocks.
_WIDTH = 256
# Bytes of a weight by what a setting says; the scales of blocks are left out.
_BYTES = (("4", 0.5), ("8", 1.0))


def load_frozen(
    path: str | os.PathLike[str],
    quantization: str | Mapping[str, Any] | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
) -> Any:
    """Load a decoder, quantised or not; as :func:`quantization_config`, and None for neither."""
    from dream_training.trust import load_language_model

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization is None:
        model = load_language_model(path, what="reader", **options)
        return model if device is None else model.to(device)
    device = device or "cpu"
    config = quantization_config(quantization, path, device=device, **options)
    with _refused(quantization):
        return load_language_model(
            path, what="reader", quantization_config=config, device_map={"": device}, **options
        )


def quantization_config(
    choice: str | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Return the config for ``from_pretrained``, and see that it can be used here.

    Args:
        choice: one of :data:`~dream_training.choices.READER_QUANTIZATIONS`, or the keys of one of
            transformers' quantisation configs, ``quant_method`` among them; torchao's
            ``quant_type`` may be the name of one of its configs.
        path: folder or hub name of the reader.
        dtype: of the weights that are not quantised.
        device: where the reader will be.
        trust_remote_code: run code that comes with the reader.

    Raises:
        ModuleNotFoundError: a package that quantises is missing.
        ValueError: there is no such method, it cannot quantise while it loads or not on this
            device, or the reader is quantised already.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    from dream_training.trust import load_model_config

    stored = load_model_config(path, trust_remote_code, "reader")
    own = getattr(stored, "quantization_config", None)
    if own is not None:
        method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
        raise ValueError(
            f"{_KEY} must be null for the reader {path}, whose weights are quantised already "
            f"({getattr(method, 'value', method)})"
        )
    weights = getattr(torch, dtype, stored.dtype) if isinstance(dtype, str) else dtype
    with _refused(choice):
        settings = dict(_SHORT[choice] if isinstance(choice, str) else choice)
        if settings["quant_method"] == "torchao":
            config = _torchao_config(settings, weights, device)
        else:
            config = AutoQuantizationConfig.from_dict(settings)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map={"": device}, dtype=weights, torch_dtype=weights)
    return config


@contextmanager
def _refused(choice: str | Mapping[str, Any]) -> Iterator[None]:
    """Make an error inside, each method having its own, one line that names the key."""
    try:
        yield
    except Exception as error:
        kind = ModuleNotFoundError if isinstance(error, ImportError) else ValueError
        reason = first_line(error) if str(error) else type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it lacks the key {reason}"
        raise kind(f"{_KEY} {shortened(choice)} cannot be used here: {reason}") from error


def _torchao_config(
    settings: dict[str, Any], dtype: torch.dtype | None, device: str | torch.device
) -> Any:
    from transformers import TorchAoConfig
    from transformers.utils import is_torchao_available

    if not is_torchao_available():
        raise ImportError("torchao is not installed; install it with: pip install torchao")
    from torchao import quantization

    own = {key: value for key, value in settings.items() if key != "quant_method"}
    kind = own["quant_type"]
    if isinstance(kind, str):
        named = getattr(quantization, kind, None)
        # Before 5.0, transformers had names of its own.
        config = TorchAoConfig(
            **{**own, "quant_type": named() if isinstance(named, type) else kind}
        )
    else:
        config = TorchAoConfig.from_dict(settings)
    if not isinstance(config.quant_type, str):
        # Nothing else tells which of them the device has products for.
        layer = nn.Linear(_WIDTH, _WIDTH, bias=False, device=device, dtype=dtype)
        model = nn.Sequential(layer.requires_grad_(False))
        quantization.quantize_(model, config.quant_type)
        model(torch.zeros(1, _WIDTH, device=device, dtype=dtype))
    return config


def bytes_of_weight(choice: str | Mapping[str, Any] | None) -> float | None:
    """Bytes that a quantised weight takes; None if they are not known, or nothing is quantised."""
    settings = _SHORT.get(choice, {}) if isinstance(choice, str) else dict(choice or {})
    chosen = [key for key, value in settings.items() if value is True]
    text = " ".join([*chosen, str(settings.get("quant_type", "")), str(settings.get("bits", ""))])
    return next((count for digit, count in _BYTES if digit in text), None)


def prepare_quantised(reader: nn.Module, model: PreTrainedModel) -> bool:
    """Make the quantised layers of a reader's model keep the gradient; returns if there are any."""
    if getattr(model, "hf_quantizer", None) is None:
        return False
    reader.register_state_dict_post_hook(_without_settings)
    # It tells at every product in which dtype it computes.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    module: Any
    for module in model.modules():
        # At its first pass without gradient it would pack its weights for a product without one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return True


def _without_settings(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Take out of a state dict what is neither a parameter nor a buffer.

    Some quantised layers add their scales, and torch's distributed checkpoints look for attributes
    of such names.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    own = {f"{prefix}{name}" for name, _ in named}
    for name in [key for key in state if key.startswith(prefix) and key not in own]:
        del state[name]


@torch.enable_grad()
def check_gradient(model: PreTrainedModel) -> None:
    """See that the gradient passes every layer of a frozen decoder.

    Raises:
        ValueError: a layer stops it; the message names the layer.
    """
    stopped: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given = any(isinstance(own, Tensor) and own.requires_grad for own in inputs)
            if given and isinstance(output, Tensor) and not output.requires_grad:
                stopped.append(f"{name} ({type(module).__name__})")

        return hook

    decoder = backbone_of(model)
    embedding: Any = model.get_input_embeddings()
    ids = torch.arange(2, device=embedding.weight.device)[None]
    states = embedding(ids).detach().requires_grad_()
    handles = [
        module.register_forward_hook(watch(name))
        for name, module in decoder.named_modules()
        if not any(True for _ in module.children())
    ]
    reason = ""
    try:
        output = decoder(inputs_embeds=states, use_cache=False).last_hidden_state
        if output.requires_grad:
            torch.autograd.grad(output.float().sum(), states)
    except (RuntimeError, NotImplementedError) as error:
        reason = first_line(error)
    finally:
        for handle in handles:
            handle.remove()
    if stopped or reason:
        raise ValueError(
            "the reader's quantised layers let no gradient through, and document scores need it: "
            f"{stopped[0] if stopped else reason}; choose another {_KEY}, or an objective that "
            "needs no gradient through the reader"
        )
