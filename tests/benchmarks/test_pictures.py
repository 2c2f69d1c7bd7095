"""The README's pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dream_benchmarks import pictures

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The files of a demo of both parts."""
    folder = tmp_path / "demo"
    (folder / "adapted").mkdir(parents=True)
    metrics = {"bm25": {"ndcg_at_10": 0.5}, "adapted": {"retriever": "MiniLM"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for place, values in ((folder, (0.02, 0.3)), (folder / "adapted", (0.6, 0.7))):
        evaluations = [{"step": 40.0 * i, "ndcg_at_10": v} for i, v in enumerate(values)]
        (place / "history.json").write_text(json.dumps({"steps": [], "evaluations": evaluations}))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Recorded times, and nothing else."""
    folder = tmp_path / "results"
    folder.mkdir()
    for record in RESULTS.glob("kernel-*.jsonl"):
        shutil.copy(record, folder)
    return folder


def test_they_are_drawn_for_light_and_dark_pages(demo: Path, results: Path, tmp_path: Path) -> None:
    record = json.loads(pictures.record_demo(demo, results).read_text())
    assert record["curves"] == {
        "a retriever from nothing": [[0.0, 0.02], [40.0, 0.3]],
        "MiniLM, adapted": [[0.0, 0.6], [40.0, 0.7]],
    }
    drawn = pictures.draw_pictures(results, tmp_path / "images", None)
    assert [path.name for path in drawn] == [
        "demo-light.svg", "demo-dark.svg", "speed-light.svg", "speed-dark.svg",
    ]  # fmt: skip
    for path, theme in zip(drawn, pictures.THEMES * 2):
        text = path.read_text()
        assert theme.text in text and theme.ours in text
    first = [path.read_bytes() for path in drawn]
    again = pictures.draw_pictures(results, tmp_path / "images", None)
    assert [path.read_bytes() for path in again] == first


def test_what_is_missing_is_named(demo: Path, results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record of a demo"):
        pictures.draw_pictures(results, tmp_path, None)
    (demo / "adapted" / "history.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapted.history\.json"):
        pictures.record_demo(demo, results)
    with pytest.raises(ValueError, match="no record of case 'laptop' on device 'abacus'"):
        pictures.speed_rows(pictures.read(results), "abacus")
