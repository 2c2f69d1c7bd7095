"""The demo on one package and a tiny model: every file it promises, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from tiny import save_decoder

from dream_training.data.beir_folder import read_beir_folder
from dream_training.demo import run_demo


def test_the_demo_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = save_decoder(tmp_path / "model", num_hidden_layers=4)
    out = tmp_path / "demo"
    metrics = run_demo(
        out, reader=str(tiny_model), steps=2, seed=1, packages=("networkx",), test_size=20
    )
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("before", "after", "bm25"):
        assert set(metrics[name]) == {"ndcg_at_10", "recall_at_10"}
    assert metrics["steps"] == 2 and metrics["seed"] == 1 and metrics["seconds"] > 0
    assert metrics["versions"]["networkx"] and metrics["versions"]["torch"]
    assert metrics["bm25"]["ndcg_at_10"] > 0.2
    for name in ("curve.png", "heads.png", "heads.yaml"):
        assert (out / name).stat().st_size > 500
    corpus, queries, _ = read_beir_folder(out / "beir")
    assert len(queries) == metrics["queries"] and len(corpus) == metrics["documents"]
    SentenceTransformer(str(out / "last"), device="cpu")
    printed = capsys.readouterr().out
    for text in ("untrained", "DREAM", "BM25", "before:", "after:", "curve.png"):
        assert text in printed
