"""Building retrievers from language models, and saving them so that they load anywhere."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

from dream_training.models.retriever import build_retriever, save_retriever

TEXTS = ["a text", "another, longer text of more words", "x"]


def make(tiny_model, **options) -> SentenceTransformer:
    torch.manual_seed(0)
    return build_retriever(tiny_model, device="cpu", **options)


def embed(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def test_a_cut_backbone_keeps_its_first_layers(tiny_model) -> None:
    model = make(tiny_model, layers=2)
    assert len(model[0].auto_model.layers) == 2
    whole = make(tiny_model)
    for name in ("layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_proj.weight"):
        assert torch.equal(
            model[0].auto_model.get_parameter(name), whole[0].auto_model.get_parameter(name)
        )
    assert torch.allclose(embed(model).norm(dim=-1), torch.ones(3), atol=1e-5)


def test_the_embedding_is_the_state_of_the_appended_end_token(tiny_model) -> None:
    model = make(tiny_model)
    batch = model.preprocess(TEXTS)
    ends = batch["input_ids"][torch.arange(3), batch["attention_mask"].sum(1) - 1]
    assert (ends == 2).all()
    # alone or beside longer texts, padded or not, a text has one embedding
    alone = model.encode(TEXTS[2:], convert_to_tensor=True)
    torch.testing.assert_close(alone[0], embed(model)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_saved_retriever_loads_and_embeds_the_same(tiny_model, tmp_path, dtype: str) -> None:
    model = make(tiny_model, layers=2, lora_r=4, dtype=dtype, prompts={"query": "ask: "})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    before = embed(model)
    bare = make(tiny_model, layers=2, dtype="float32")
    assert not torch.allclose(before.float(), embed(bare), atol=1e-2)
    path = save_retriever(model, tmp_path / "model")
    loaded = SentenceTransformer(str(path), device="cpu")
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    # transformers 4.57 loads in float32 regardless of what is stored
    torch.testing.assert_close(
        embed(loaded).float(), before.float(), rtol=tolerance, atol=tolerance
    )
    assert loaded.prompts["query"] == "ask: "
    assert loaded.preprocess(["a"])["input_ids"][0, -1] == 2
    assert torch.equal(embed(model), before), "saving must leave the model as it is"
    assert any("lora_" in name for name, _ in model.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_replaces_the_folder_as_a_whole(tiny_model, tmp_path, monkeypatch) -> None:
    model = make(tiny_model, layers=1)
    path = save_retriever(model, tmp_path / "model")
    (path / "stale").touch()
    save_retriever(model, path)
    assert not (path / "stale").exists()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_retriever(model, path)
    SentenceTransformer(str(path), device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_any_sentence_transformers_model_can_be_trained_on(tiny_model, tmp_path) -> None:
    path = save_retriever(make(tiny_model, layers=1), tmp_path / "model")
    model = build_retriever(path, lora_r=2, max_len=16, device="cpu")
    assert model.max_seq_length == 16
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="retriever_layers cuts a language model"):
        build_retriever(path, layers=1)


def test_adapters_are_float32_on_a_bfloat16_backbone(tiny_model) -> None:
    model = make(tiny_model, lora_r=2, dtype="bfloat16")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert len(trained) == 2 * 7 * 3  # A and B of all seven projections of three layers


def test_more_layers_than_there_are_is_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match=r"retriever_layers must lie in 1 \.\. 3, got 4"):
        make(tiny_model, layers=4)
