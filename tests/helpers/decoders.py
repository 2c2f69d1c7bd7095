"""A tiny random model of every architecture of transformers that is a decoder."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, HEADS, VOCABULARY = 4, 4, 64
_SIZES = {
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
    "encoder_layers num_encoder_layers "
    "n_routed_experts num_experts num_local_experts moe_num_experts "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads attention_heads mamba_n_heads "
    "mamba_num_heads linear_num_value_heads mamba_dt_rank linear_num_heads indexer_n_heads "
    "index_n_heads",
    1: "n_group topk_group n_shared_experts mamba_n_groups n_groups mamba_ngroups bos_token_id "
    "num_expert_group",
    2: "num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk eos_token_id "
    "linear_num_key_heads n_mamba_heads indexer_kv_heads attn_layer_period attn_layer_offset "
    "num_mem_blocks num_kv_shared_layers",
    8: "head_dim kv_channels d_kv global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_state ssm_state_size "
    "state_size hidden_size_per_layer_input linear_head_dim index_head_dim indexer_head_dim "
    "rotary_dim attention_head_dim",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim embedding_size word_embed_proj_dim "
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner dim_ff dff "
    "ffn_hidden_size intermediate_size_mlp lru_width attention_hidden_size router_hidden_size "
    "block_multiple_of",
    64: "vocab_size vocab_size_per_layer_input mamba_d_ssm",
    128: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_intermediate_size q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_headdim "
    "laurel_rank ple_embed_dim sliding_window attention_window_size attention_chunk_size "
    "window_size",
    0: "pad_token_id",
}  # fmt: skip
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
# What the sizes do not say.
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_SMALL_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_FURTHER: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": LAYERS},
    "deepseek_v3": {"first_k_dense_replace": LAYERS},
    "dots1": {"n_routed_experts": 4, "first_k_dense_replace": LAYERS, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_layer_start_index": LAYERS},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": 32,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "git": {"vision_config": _SMALL_VISION},
    "glm4_moe": {"first_k_dense_replace": LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_dense": {**_PLAIN_ROPE, "head_dim": 8},
    "hunyuan_v1_moe": {**_PLAIN_ROPE, "head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {**_PLAIN_ROPE, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_OLD_FURTHER: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False},
}
if transformers.__version__ < "5":
    _FURTHER.update(_OLD_FURTHER)


# Not built: too large whatever the config says, or parts are missing.
NOT_BUILT = (
    "blt", "cohere_compass_text", "fuyu", "gemma4_assistant", "gemma4_unified_assistant", "mega",
    "mllama", "musicgen_melody", "phi4_multimodal", "qdqbert", "qwen4_exp_text", "speech_to_text_2",
    "transfo-xl",
    *(("dbrx", "zamba") if transformers.__version__ >= "5" else ("ernie4_5_moe", "longcat_flash")),
)  # fmt: skip


def model_types() -> list[str]:
    """The model types of this transformers, one for each class of decoder."""
    classes = {}
    # Of a model that reads images as well, the part that reads text.
    for model_type, name in sorted(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), key=lambda item: ("text" not in item[0], item)
    ):
        if not name.endswith("ForConditionalGeneration") and hasattr(transformers, name):
            classes.setdefault(name, model_type)
    return sorted(set(classes.values()) - set(NOT_BUILT))


def make_decoder(model_type: str, **changes: Any) -> transformers.PreTrainedModel:
    """A frozen tiny model with weights large enough for peaked attention, in double precision.

    Layers of every kind that the architecture has are in it.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    kind = getattr(transformers, name).config_class
    taken = set(inspect.signature(kind.__init__).parameters)
    if "kwargs" in taken or not taken - {"self", "args"}:
        taken |= set(kind().to_dict())
    default = kind()
    options = {name: size for name, size in _SIZE_OF.items() if _has(default, name, taken)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "layer_types" in taken:
        options["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    if "kv_lora_rank" in taken:
        options["num_key_value_heads"] = HEADS
    config = kind(**{**options, **_FURTHER.get(model_type, {}), **changes})
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, name)(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(6.0)
        elif name.endswith("sinks"):
            parameter.normal_()
    return model


def _has(default: Any, name: str, taken: set[str]) -> bool:
    try:
        value = getattr(default, name, None)
    except Exception:
        value = 1
    return name in taken and (value is not None or name.endswith(("token_id", "vocab_size")))
