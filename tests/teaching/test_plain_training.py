"""The folder trains in plain sentence-transformers, by the lines of docs/teaching.md as printed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch

from dream_training.models.retriever import build_retriever, save_retriever
from dream_training.objectives.taught import TaughtCollator, TaughtDreamLoss
from dream_training.teaching.teach import teach
from helpers.objectives import split
from helpers.taught import rows_of, teaching_config, write_rows
from helpers.tiny import quiet

PAGE = Path(__file__).resolve().parents[2] / "docs" / "teaching.md"
KL, MARGIN = "losses.DistillKLDivLoss(model, temperature=0.05)", "losses.MarginMSELoss(model)"


@pytest.fixture(scope="module")
def workspace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names on the page are those of tiny things."""
    folder = tmp_path_factory.mktemp("plain")
    retriever = build_retriever(tiny_model, layers=2, max_len=64, dtype="float32", device="cpu")
    save_retriever(retriever, folder / "sentence-transformers" / "all-MiniLM-L6-v2")
    config = teaching_config(tiny_model, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write_rows(folder / "train.jsonl", [row for row in rows if len(row["documents"]) == 3])
    teach(config, folder / "runs" / "taught", console=quiet())
    return folder


def block() -> str:
    (found,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
        if "load_dataset" in code
    ]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("code", "teacher_loss"), [(KL, "kl"), (MARGIN, "margin")])
def test_the_lines_of_the_page(workspace: Path, monkeypatch, code: str, teacher_loss: str) -> None:
    """They run, and their loss is that of ``dream train`` times the square of the temperature."""
    lines = block()
    assert KL in lines and MARGIN in lines
    assert sum(bool(line.strip()) for line in lines.splitlines()) <= 12
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workspace / "cache")
    names: dict[str, Any] = {}
    exec(lines.replace(KL, code), names)
    model, data = names["model"], names["data"]
    assert len(data) == 3 and data.column_names == [
        "query", "document_0", "document_1", "document_2", "label"
    ]  # fmt: skip
    model.eval()
    rows = rows_of(workspace / "runs" / "taught")
    features = split(TaughtCollator(model)(rows))
    own = TaughtDreamLoss(model, 0.05, teacher_loss=teacher_loss)(features)
    columns = [
        model.preprocess([row[name] for row in data])
        for name in data.column_names
        if name != "label"
    ]
    plain = names["loss"](columns, torch.tensor(data["label"]))
    assert math.isclose(plain.item(), own.item() * 0.05**2, rel_tol=1e-3) and own.item() > 1e-3


def test_the_readme_shows_the_command() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text()
    assert "dream teach" in readme and "docs/teaching.md" in readme
