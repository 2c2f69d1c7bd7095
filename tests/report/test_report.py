"""The report: its content, that it is self-contained, and mistakes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_kernels import HeadFile, write_heads
from dream_training.cli import app
from dream_training.config import TrainConfig
from dream_training.evaluation import Evaluation, write_evaluations
from dream_training.report import read_run, write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps text and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))


def make_run(path: Path, shift: float = 0.0, examples: bool = True, **config) -> Path:
    """Write the files of a run of four steps."""
    path.mkdir()
    settings = TrainConfig(reader="r", train_data="t.jsonl", max_steps=4, top_k=2, **config)
    (path / "config.json").write_text(json.dumps(settings.flat()))
    steps = [
        {
            "step": i, "loss": 3.0 - 0.5 * i, "entropy": 1.0, "max_entropy": 1.386, "tokens": 400,
            "seconds": 0.5, "weight_on_positive": 0.2 * i,
        }
        for i in range(1, 5)
    ]  # fmt: skip
    evaluations = [
        {"step": 0.0, "ndcg_at_10": 0.125, "recall_at_10": 0.2},
        {"step": 4.0, "ndcg_at_10": 0.5 + shift, "recall_at_10": 0.7},
    ]
    history = {"steps": steps, "evaluations": evaluations}
    (path / "history.json").write_text(json.dumps(history))
    scores = {(layer, head): 0.1 * layer - 0.05 * head for layer in range(3) for head in range(2)}
    write_heads(path / "heads.yaml", HeadFile(sorted(scores, key=scores.get)[::-1], scores))
    queries = [f"q{i}" for i in range(12)]
    write_evaluations(
        path / "evaluation.json",
        [
            Evaluation("untrained", "my-task", 0.125, 0.2, 9, dict.fromkeys(queries, 0.125)),
            Evaluation(
                str(path / "best"), "my-task", 0.5 + shift, 0.7, 9,
                {q: 0.5 + shift + (0.1 if i % 2 else -0.1) for i, q in enumerate(queries)},
            ),
        ],
        {},
    )  # fmt: skip
    if examples:
        query = {
            "query": "who <wrote> & Emma", "target": "Austen", "positive": 1, "mass": [0.2, 0.1],
            "before": {"weights": [0.75, 0.25], "loss": 2.5},
            "after": {"weights": [0.0625, 0.9375], "loss": 1.25},
        }  # fmt: skip
        moment = {"alignment": 1.5, "uniformity_queries": -2.0, "uniformity_documents": -1.0}
        geometry = {"pairs": 7, "before": moment, "after": {**moment, "alignment": 0.75}}
        content = {"documents": ["<b>first", "second"], "queries": [query], "geometry": geometry}
        (path / "examples.json").write_text(json.dumps(content))
    (path / "environment.json").write_text(
        json.dumps({"device": "a cpu", "versions": {"torch": "9.9"}})
    )
    return path


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_single_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    result = CliRunner().invoke(app, ["report", str(run)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert f"The report: {run / 'report.html'}" in result.output
    _, page = read(run / "report.html")
    headings = ("Runs", "Curves", "Evaluations", "Configuration", "Heads of the reader")
    headings += ("What the reader reads", "Geometry of the embeddings", "Environment")
    for heading in headings:
        assert heading in page.texts
    # nDCG@10 before and after, mean of the first and last tenth, tokens over seconds.
    for figure in ("0.125", "0.500", "2.500", "1.000", "800", "+0.375", "< 0.001"):
        assert figure in page.texts, figure
    assert {"a cpu", "9.9", "learning_rate", "my-task"} <= set(page.texts)
    assert {"0.750", "0.938", "0.200"} <= set(page.texts), "weights and mass of the example"
    assert page.texts.index("second") < page.texts.index("<b>first"), "by the weight after training"
    assert "1.500" in page.texts and "-2.000" in page.texts
    assert page.tags.count("figure") == 6 and "against mine" not in page.texts


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name)) for name in ("a", "b")]
    text, page = read(write_report(runs, tmp_path / "new" / "report.html"))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    # Namespaces are URLs but fetch nothing; a map of heads embeds its own picture.
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in text
    assert not re.findall(r'(?:href|src)="(?!#|data:)', text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "&lt;wrote&gt; &amp; Emma" in text and "<b>first" not in text
    # Placeholder colours are all replaced, and clip paths do not share a name.
    assert not re.search(r"#0102[01]", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', text)) <= set(ids)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a")),
        read_run(make_run(tmp_path / "b", shift=0.25, temperature=0.5, examples=False)),
    ]
    text, page = read(write_report(runs, tmp_path / "report.html"))
    assert "against a" in page.texts and "+0.250" in page.texts
    assert "<strong>0.750</strong>" in text and "<strong>0.500</strong>" not in text
    start = page.texts.index("Configuration")
    end = page.texts.index("Keys on which the runs agree")
    assert page.texts[start + 1 : end] == ["key", "a", "b", "temperature", "0.05", "0.5"]
    assert "var(--series-1)" in text


def test_a_minimal_run(tmp_path: Path) -> None:
    """No reader, no evaluation, no examples, one step: as InfoNCE without eval_data leaves it."""
    path = make_run(tmp_path / "bare", objective="infonce", examples=False)
    for name in ("heads.yaml", "evaluation.json", "environment.json"):
        (path / name).unlink()
    (path / "history.json").write_text(
        json.dumps({"steps": [{"step": 1, "loss": 2.0, "seconds": 1.0}], "evaluations": []})
    )
    _, page = read(write_report([read_run(path)], tmp_path / "report.html"))
    assert page.tags.count("figure") == 1 and "(interrupted)" in page.texts
    assert "Evaluations" not in page.texts and "Heads of the reader" not in page.texts


def test_other_queries_are_not_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b")
    write_evaluations(
        second / "evaluation.json", [Evaluation("m", "my-task", 0.5, 0.5, 9, {"z": 0.5})], {}
    )
    runs = [read_run(first), read_run(second)]
    _, page = read(write_report(runs, tmp_path / "report.html"))
    assert "other queries" in page.texts


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        make_run(tmp_path / parent / "run")
    output = tmp_path / "report.html"
    folders = [str(tmp_path / parent / "run") for parent in ("x", "y")]
    result = CliRunner().invoke(app, ["report", *folders, "--output", str(output)])
    assert result.exit_code == 0, result.output
    _, page = read(output)
    assert set(folders) <= set(page.texts)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; expected the output_dir"):
        read_run(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "history.json").write_text('{"steps": 1}')
    with pytest.raises(ValueError, match=r"history\.json: must hold a list named 'steps'"):
        read_run(run)
    (run / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history\.json: not valid JSON"):
        read_run(run)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
