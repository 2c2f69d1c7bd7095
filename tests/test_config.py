"""Configs: files, overrides, and mistakes."""

from __future__ import annotations

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
        ("- a\n", [], "must hold keys and values, got list"),
        ("a: [\n", [], "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text), overrides)
