"""The retriever: a sentence-transformers model, or one built from a language model's backbone."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dream_kernels.files import whole_folder
from dream_training.console import progress
from dream_training.distributed import world
from dream_training.distributed.sharding import whole
from dream_training.models.precision import train_in_float32
from dream_training.models.text_tokens import check_vocabulary
from dream_training.models.texts import read_lengths, write_lengths
from dream_training.trust import guarded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def build_retriever(
    path: str | os.PathLike[str],
    *,
    layers: int | None = None,
    lora_r: int = 0,
    lora_alpha: int | None = None,
    max_len: int = 128,
    dtype: str = "auto",
    device: str | None = None,
    prompts: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Load a sentence-transformers model, or build one from a language model.

    A language model becomes ``backbone -> last token -> L2 norm``, its tokenizer appending the
    end-of-sequence token, whose state is the embedding (as in the DREAM paper).

    Args:
        path: a sentence-transformers model or a transformers decoder, as folder or hub name, or a
            decoder's GGUF file.
        layers: keep only the first ``layers`` of a decoder's layers; None for all.
        lora_r: rank of the LoRA adapters on all linear layers; 0 trains every weight.
        lora_alpha: LoRA's scale, twice the rank by default.
        max_len: tokens of a text that are encoded, the end-of-sequence token included.
        dtype: of the weights: ``"auto"`` as stored, ``"float32"``, ``"bfloat16"``, ... What is
            trained is kept in float32, see
            :func:`~dream_training.models.precision.train_in_float32`.
        device: where to put the model; None for sentence-transformers' choice.
        prompts: prompt texts by name, such as ``{"query": ..., "document": ...}``; other
            prompts of the model are kept.
        trust_remote_code: run code that comes with the model.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: ``layers`` does not fit the model, the model comes with code and
            ``trust_remote_code`` is not set, or its weights are pickled.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    from dream_training.known_models import check_name
    from dream_training.models.gguf_files import unpacked
    from dream_training.models.retriever import load_sentence_transformer
    from dream_training.models.text_tokens import check_vocabulary
    from dream_training.trust import guarded

    path = unpacked(path, dtype, "retriever")
    check_name(path, "retriever")
    model_kwargs = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if is_sentence_transformer_model(str(path)):
        if layers is not None:
            raise ValueError(
                "retriever_layers cuts a language model, and this is a sentence-transformers "
                f"model: {path}"
            )
        model = load_sentence_transformer(
            path,
            device=device,
            prompts=prompts,
            model_kwargs=model_kwargs,
            trust_remote_code=trust_remote_code,
            what="retriever",
        )
        model.max_seq_length = max_len
    else:
        with guarded(path, trust_remote_code, "retriever"):
            modules = _modules_of_decoder(path, layers, max_len, model_kwargs, trust_remote_code)
        check_vocabulary(modules[0].tokenizer, modules[0].auto_model, "retriever")
        model = SentenceTransformer(modules=modules, device=device, prompts=prompts)
    if lora_r:
        _add_lora(model, lora_r, lora_alpha or 2 * lora_r)
    train_in_float32(model)
    return model


def _modules_of_decoder(
    path: str | os.PathLike[str],
    layers: int | None,
    max_len: int,
    model_kwargs: dict[str, Any],
    trust_remote_code: bool,
) -> list[Any]:
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import AutoConfig

    from dream_training.trust import weight_options

    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, **remote)
    config_kwargs: dict[str, Any] = dict(remote)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(
                f"retriever_layers must lie in 1 .. {config.num_hidden_layers}, got {layers}"
            )
        config_kwargs["num_hidden_layers"] = layers
        if getattr(config, "layer_types", None):
            config_kwargs["layer_types"] = config.layer_types[:layers]
    transformer = Transformer(
        str(path),
        max_seq_length=max_len,
        model_kwargs={**model_kwargs, **weight_options(trust_remote_code)},
        processor_kwargs=dict(remote),
        config_kwargs=config_kwargs,
        # A tokenizer with a chat template would wrap every text in a conversation.
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    transformer.tokenizer.chat_template = None
    _append_end_of_sequence(transformer.tokenizer)
    pooling = Pooling(config.hidden_size, pooling_mode="lasttoken")
    return [transformer, pooling, Normalize()]


def _append_end_of_sequence(tokenizer: Any) -> None:
    """Make the tokenizer end every text with its end-of-sequence token, even if it cuts it."""
    from tokenizers.processors import TemplateProcessing

    if tokenizer.eos_token is None:
        raise ValueError("the retriever's tokenizer has no end-of-sequence token to pool on")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token
    begin = getattr(tokenizer, "bos_token", None)
    # Tokenizers that begin with a special token keep doing so.
    begins = begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {eos}" if begins else f"$A {eos}",
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token))
            for token in ({begin, eos} if begins else {eos})
        ],
    )


def _add_lora(model: SentenceTransformer, rank: int, alpha: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    # peft's own function: transformers' `add_adapter` requires a peft release that may not be
    # out yet (transformers 5.24 requires 0.22).
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    backbone: Any = model.transformers_model
    inject_adapter_in_model(config, backbone)


def save_retriever(model: SentenceTransformer, path: str | os.PathLike[str]) -> Path:
    """Save the model, adapters merged into their layers, so that it loads without its backbone.

    The folder appears whole or not at all. The model itself is left as it is. All processes call
    it, since the weights may be sharded over them; process 0 writes.

    Returns:
        The folder, for ``SentenceTransformer(path)``.
    """
    path = Path(path)
    own = whole(model)
    if not world.is_main():
        return path
    with progress(f"saving {path.name}"), whole_folder(path) as folder:
        saved = merged(own, private=own is not model)
        saved.save_pretrained(str(folder))
        write_lengths(saved, folder)
    return path


def merged(model: SentenceTransformer, private: bool = False) -> SentenceTransformer:
    """Return a copy whose LoRA layers are ordinary layers; the model itself if it has none.

    This is what :func:`save_retriever` writes, and it embeds about twice as fast.

    Args:
        model: the retriever.
        private: the model is not used elsewhere, so its modules need no copying.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from sentence_transformers import SentenceTransformer

    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return model
    # Module by module: the model card refers to the trainer, and so to the reader.
    copied = SentenceTransformer(
        modules=list(model) if private else [copy.deepcopy(module) for module in model],
        device=str(model.device),
        prompts=model.prompts,  # type: ignore[arg-type]
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, module.get_base_layer())
    backbone: Any = copied[0].auto_model
    backbone._hf_peft_config_loaded = False
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    return copied


def load_sentence_transformer(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    what: str = "model",
    **options: Any,
) -> SentenceTransformer:
    """Load a sentence-transformers model; ``options`` are its own.

    Raises:
        OSError: there is no such model.
        ValueError: the model comes with code that is not allowed, or pickled weights; or its
            tokenizer does not fit.
    """
    from sentence_transformers import SentenceTransformer

    model_kwargs = {**options.pop("model_kwargs", {}), "use_safetensors": True}
    with guarded(path, trust_remote_code, what):
        model = SentenceTransformer(
            str(path), model_kwargs=model_kwargs, trust_remote_code=trust_remote_code, **options
        )
    check_vocabulary(model.tokenizer, getattr(model[0], "auto_model", None), what)
    read_lengths(model, Path(path))
    return model
