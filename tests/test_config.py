"""Configs: files, overrides, and mistakes."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dream_training.config import TrainConfig, load_config

REQUIRED = "reader: some/model\ntrain_data: data.jsonl\n"


def write(tmp_path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides(tmp_path) -> None:
    path = write(tmp_path, REQUIRED + "learning_rate: 1e-4\nbatch_size: 8\ntop_k: null\n")
    config = load_config(path, ["batch_size=4", "--max-steps=7", "eval_data=null"])
    assert config == TrainConfig(
        reader="some/model", train_data="data.jsonl", learning_rate=1e-4, batch_size=4,
        top_k=None, max_steps=7,
    )  # fmt: skip
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        (
            REQUIRED + "temprature: 0.1\n",
            [],
            "unknown key 'temprature'; did you mean 'temperature'",
        ),
        (REQUIRED, ["lerning_rate=1"], "command line: unknown key .* mean 'learning_rate'"),
        (REQUIRED + "zzz: 1\n", [], "unknown key 'zzz'$"),
        ("reader: x\n", [], "missing key train_data"),
        (REQUIRED, ["batch_size"], "must be written key=value, got 'batch_size'"),
        (REQUIRED, ["batch_size=1"], "batch_size must be at least 2, got 1"),
        (REQUIRED, ["batch_size=many"], "batch_size must be int, got 'many'"),
        (REQUIRED, ["batch_size=2.5"], "batch_size must be int, got 2.5"),
        (REQUIRED, ["trust_remote_code=maybe"], "trust_remote_code must be bool"),
        (REQUIRED, ["temperature=0"], "temperature must be positive, got 0.0"),
        (REQUIRED, ["temperature=hot"], "temperature must be float, got 'hot'"),
        (REQUIRED, ["objective=magic"], "objective must be one of .*'magic'"),
        (REQUIRED, ["mini_batch_size=0"], "mini_batch_size must be at least 1, got 0"),
        (REQUIRED, ["pool=all"], "pool must be one of .*'all'"),
        (REQUIRED, ["documents_per_query=0"], "documents_per_query must be at least 1, got 0"),
        (REQUIRED, ["pool=in_batch", "documents_per_query=4"], "null with pool 'in_batch'.* got 4"),
        (
            REQUIRED,
            ["document_store=memory", "context=joint"],
            "document_store must be null unless",
        ),
        (REQUIRED, ["train_positives=all"], "train_positives must be one of .*'all'"),
        (REQUIRED, ["streaming=true", "objective=infonce"], "needs all lines at once"),
        (REQUIRED, ["injected_rows=some"], "injected_rows must be one of .*'some'"),
        (REQUIRED, ["context=both"], "context must be one of .*'both'"),
        (REQUIRED, ["top_k=best"], "top_k must be int or null"),
        (REQUIRED, ["reader.contxt=joint"], "unknown key 'reader.contxt'; did .* 'reader.context'"),
        (REQUIRED, ["reader.reader=x"], "did you mean 'reader.model'"),
        (REQUIRED, ["reader.batch_size=4"], "did you mean 'optimisation.batch_size'"),
        (REQUIRED, ["reader.zzz=1"], "command line: unknown key 'reader.zzz'$"),
        (REQUIRED, ["zzz.context=joint"], "command line: unknown key 'zzz.context'"),
        (REQUIRED, ["optimization={batch_size: 4}"], "did you mean 'optimisation'"),
        (REQUIRED, ["pools=both"], "command line: pools must map pool, .* to values, got 'both'"),
        (REQUIRED, ["pools.pool=all"], "pool must be one of .*'all'"),
        (REQUIRED, ["heads={file: 3}"], "heads must be str, got 3"),
        (
            REQUIRED,
            ["reader.context=joint", "context=joint"],
            "command line: context is given twice, as reader.context and as context: keep one",
        ),
        (
            REQUIRED + "context: joint\nheads: {top_k: 3}\ntop_k: 3\n",
            [],
            "config.yaml: top_k is given twice, as heads.top_k and as top_k",
        ),
        ("data: {train_split: x}\n", [], "missing key reader, train_data"),
        (
            REQUIRED + "reader.model: other\n",
            [],
            "reader is given twice, as reader and as reader.m",
        ),
        (REQUIRED, ["gather_across_devices=true", "pool=mined"], "gather_across_devices must be f"),
        ("- a\n", [], "must hold keys and values, got list"),
        ("a: [\n", [], "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_groups_and_flat_keys_say_the_same(tmp_path) -> None:
    grouped = write(
        tmp_path,
        "reader: {model: some/model, context: joint}\n"
        "data:\n  train_data: data.jsonl\n"
        "optimisation: {batch_size: 8, learning_rate: 1e-4}\n"
        "objective: infonce\n",
    )
    config = load_config(grouped, ["optimisation.batch-size=4", "heads={file: h.yaml}", "seed=3"])
    assert config == TrainConfig(
        reader="some/model", context="joint", train_data="data.jsonl", batch_size=4,
        learning_rate=1e-4, objective="infonce", heads="h.yaml", seed=3,
    )  # fmt: skip
    assert (config.reader.context, config.optimisation.batch_size) == ("joint", 4)
    assert (config.batch_size, config.heads.file) == (4, "h.yaml")


def test_every_key_survives_each_form() -> None:
    config = TrainConfig(reader="r", train_data="t", top_k=3, fsdp_config=None, retriever="other")
    flat = config.flat()
    assert (flat["reader"], flat["retriever"], flat["top_k"]) == ("r", "other", 3)
    assert TrainConfig(**flat) == config
    assert TrainConfig(**asdict(config)) == config
    own = {"reader": config.reader, "data": config.data, "heads.top_k": 3}
    assert TrainConfig(**own) == config.with_changes(retriever="smollm2")


def test_changes_keep_the_other_keys_of_a_group() -> None:
    config = TrainConfig(reader="r", train_data="t", context="joint")
    changed = config.with_changes(reader="other", optimisation={"batch_size": 4})
    assert (changed.reader.model, changed.reader.context) == ("other", "joint")
    assert changed.optimisation.batch_size == 4 and config.reader.model == "r"
    with pytest.raises(ValueError, match="unknown key 'bach_size'; did you mean 'batch_size'"):
        config.with_changes(bach_size=4)
    # It would lose the other keys of the group.
    with pytest.raises(ValueError, match="cannot be specified with replace"):
        replace(config, reader="other")
    with pytest.raises(AttributeError, match="no attribute 'bach_size'"):
        config.bach_size  # noqa: B018
