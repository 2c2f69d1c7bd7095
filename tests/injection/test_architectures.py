"""Architectures beyond those of the other tests: the operator computes their own attention.

With scores of 0 added to the logits every layer attends through the operator and changes nothing,
whatever the model's scale, rotation, norms or grouping are; and so with the documents in a prefix.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers

from dream_kernels import inject_attention, read_jointly
from dream_kernels.injection import support

NAMES = (
    "Apertus", "Arcee", "Cohere", "Cohere2", "Ernie4_5", "Exaone4", "GPT2", "GPTNeoX", "Gemma",
    "Glm", "Glm4", "Granite", "Helium", "Ministral", "Olmo", "Olmo2", "Olmo3", "OPT", "Persimmon",
    "Phi", "Phi3", "SeedOss", "SmolLM3", "Starcoder2",
)  # fmt: skip
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 32,
    "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _make(name: str):
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    taken = inspect.signature(kind.__init__).parameters
    config = kind(**{key: value for key, value in _SIZES.items() if key in taken})
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6.0)
    return model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores_of_zero_change_nothing(name: str) -> None:
    model = _make(name)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 24), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    spans = torch.tensor([[[1, 3], [3, 6]]])
    zero, scores = torch.zeros(2, 2), torch.tensor([[0.0, 5.0]] * 2)
    plain = model(ids, attention_mask=mask).logits
    if (reason := support.why_not(model)) is not None:
        assert transformers.__version__ < "5", reason
        assert "dispatch" in reason or "pass keyword arguments on" in reason
        return
    with inject_attention(model, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, mode="bias"):
        whole = {"attention_mask": mask, "document_spans": spans}
        actual = model(ids, document_scores=zero, **whole).logits
        acting = model(ids, document_scores=scores, **whole).logits
        prefix = read_jointly(model, ids[:, :6], spans.expand(2, -1, -1))
        suffix = {"attention_mask": mask[:, 6:], "document_prefix": prefix}
        with_prefix = model(ids[:, 6:], document_scores=scores, **suffix).logits
    tokens = mask.bool()
    scale = plain.abs().max()
    for a, b in (
        (actual[tokens], plain[tokens]),
        (with_prefix[tokens[:, 6:]], acting[:, 6:][tokens[:, 6:]]),
    ):
        # Some of their norms and rotations compute in single precision.
        assert (a - b).abs().max() < 1e-5 * scale
    assert (acting - plain)[tokens].abs().max() > 1e-3 * scale
