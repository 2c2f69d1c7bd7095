"""Tiny random decoders of every supported class, and a slow oracle of the injected attention."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXTRA = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "Gemma2": {"attn_logit_softcapping": None, "query_pre_attn_scalar": 8, "sliding_window": 200},
    "Gemma3": {"query_pre_attn_scalar": 8, "sliding_window": 200},
}
NAMES = tuple(_EXTRA)


def make_model(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes
) -> transformers.PreTrainedModel:
    """A frozen tiny decoder of class ``name`` with weights large enough to give peaked attention.

    ``attention`` is set behind transformers' back: it keeps Gemma 2 from sdpa because of a soft cap
    that is off here, and its eager attention computes float64 softmaxes in float32.
    """
    suffix = "Text" if name == "Gemma3" else ""
    config_class = getattr(transformers, f"{name}{suffix}Config")
    config = config_class(**{**_SIZES, **_EXTRA[name], **changes})
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6.0)
        parameter.requires_grad_(False)
    model.config._attn_implementation = attention
    return model


def register_oracle(heads: dict[int, list[int]], mode: str, document_mass: float | None) -> str:
    """Register an attention that loops over rows and documents in plain PyTorch.

    Visibility comes from the model's own additive mask; ``oracle_documents`` ``[B, T]`` names the
    document of each key (-1 for none) and ``oracle_scored`` ``[B, M]`` the scored rows.
    """

    def oracle(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        logits = scaling * query @ key.transpose(2, 3)
        logits = logits + attention_mask
        hidden = attention_mask < -1
        plain = torch.softmax(logits, -1)
        out = plain @ value
        documents, scores = kwargs["oracle_documents"], kwargs["oracle_scores"]
        rows = []
        for b in range(query.shape[0]):
            present = [c for c in range(scores.shape[-1]) if (documents[b] == c).any()]
            for h in heads.get(module.layer_idx, []):
                s = scores[b] if scores.dim() == 2 else scores[b, h]
                w = torch.softmax(s[present], 0) if present else None
                for m in range(query.shape[2]):
                    if not present or not kwargs["oracle_scored"][b, m]:
                        continue
                    visible = ~hidden[b, 0, m]
                    a, p = logits[b, h, m], plain[b, h, m]
                    if mode == "bias":
                        boost = torch.zeros_like(a)
                        for c in present:
                            boost = boost + torch.where(documents[b] == c, s[c], 0.0)
                        o = torch.softmax(a + boost, -1) @ value[b, h]
                    else:
                        inside = visible & (documents[b] >= 0)
                        outside = visible & (documents[b] < 0)
                        mu = p[inside].sum() if document_mass is None else document_mass
                        mu = mu if outside.any() else 1.0
                        o = 0.0
                        for weight, c in zip(w, present, strict=True):
                            keys = visible & (documents[b] == c)
                            o = o + mu * weight * torch.softmax(a[keys], 0) @ value[b, h][keys]
                        if outside.any():
                            rest = torch.softmax(a[outside], 0) @ value[b, h][outside]
                            o = o + (1 - mu) * rest
                    rows.append((b, h, m, o))
        if rows:
            index = tuple(torch.tensor([r[i] for r in rows]) for i in range(3))
            out = out.index_put(index, torch.stack([r[3] for r in rows]))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", oracle)
    AttentionMaskInterface.register("oracle", eager_mask)
    return "oracle"


def target_loss(logits: Tensor, input_ids: Tensor, is_target: Tensor) -> Tensor:
    """Mean next-token loss over the tokens marked in ``is_target``, both ``[B, M]``."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    return loss[is_target[:, 1:].flatten()].mean()
