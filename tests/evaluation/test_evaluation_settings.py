"""What must agree before the figures of two evaluations are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.evaluation import Evaluation, read_evaluations, write_evaluations
from dream_training.evaluation.results import BM25, compare_settings, is_same_task
from dream_training.training.driver import train
from helpers.tiny import write_tiny_data

SETTINGS = {
    "split": "test",
    "query_max_len": 16,
    "passage_max_len": 32,
    "prompts": {"query": "", "document": ""},
    "documents_digest": "aa",
    "queries_digest": "bb",
    "relevance_digest": "cc",
    "path": "/data/beir",
}


def dream(*arguments: object):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def evaluation(model: str = "m", task: str = "beir", **changes) -> Evaluation:
    settings = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}
    return Evaluation(model, task, 0.5, 1.0, 9, {"q0": 0.0, "q1": 1.0}, settings)


def write(path: Path, *evaluations: Evaluation) -> Path:
    return write_evaluations(path, evaluations, {})


@pytest.mark.parametrize(
    "key, value, shown",
    [
        ("query_max_len", 8, "query_max_len is 16 in the first and 8 in the second"),
        ("prompts", {"query": "Q: "}, "prompts is .* in the first and {'query': 'Q: '} in the"),
        ("split", "dev", "split is 'test' in the first and 'dev'"),
        ("documents_digest", "other", "documents_digest is 'aa' in the first and 'other'"),
        ("a_setting_of_tomorrow", 1, None),
    ],
)
def test_a_difference_is_an_error_that_names_it(tmp_path: Path, key, value, shown) -> None:
    a = write(tmp_path / "a.json", evaluation())
    b = write(tmp_path / "b.json", evaluation(**{key: value}))
    if shown is None:
        output = dream("compare-runs", a, b)
        assert f"warning: task 'beir': {key} cannot be compared" in " ".join(output.split())
        return
    with pytest.raises(ValueError, match=f"task 'beir': {shown}.*--allow-different"):
        dream("compare-runs", a, b)
    output = " ".join(dream("compare-runs", a, b, "--allow-different").split())
    assert f"warning: task 'beir': {key} is {SETTINGS[key]!r} in the first and" in output


def test_what_an_older_file_lacks_is_reported_and_not_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", evaluation())
    b = write(tmp_path / "b.json", evaluation(prompts=None, documents_digest=None))
    output = " ".join(dream("compare-runs", a, b).split())
    assert "prompts, documents_digest cannot be compared, because only one of the files" in output


def test_bm25_has_no_lengths_to_miss(tmp_path: Path) -> None:
    lacks = dict.fromkeys(("query_max_len", "passage_max_len", "prompts"))
    found = compare_settings(evaluation(), evaluation(BM25, **lacks))
    assert not found.different and not found.unknown
    assert compare_settings(evaluation(), evaluation(BM25, split="dev")).different


def test_a_task_is_the_same_by_name_folder_or_data(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "beir"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    plain = dict.fromkeys(SETTINGS)
    for a, b, same in (
        (evaluation(task="beir", **plain), evaluation(task=str(folder), **plain), True),
        (evaluation(task="link", **plain), evaluation(task="./beir", **plain), True),
        (evaluation(task="beir", **plain), evaluation(task="other", **plain), False),
        (evaluation(task="x", path="/a"), evaluation(task="y", path="/b"), True),
        (
            evaluation(task="x", path="/a"),
            evaluation(task="y", path="/b", documents_digest="other"),
            False,
        ),
    ):
        assert is_same_task(a, b) is is_same_task(b, a) is same, (a, b)


def test_the_figures_of_a_run_and_of_its_folder_are_compared(
    run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run(eval_data="beir", query_max_len=24, passage_max_len=24, max_steps=2)
    path = train(config).path
    output = tmp_path / "evaluation.json"
    options = ["--query-max-len", 24, "--passage-max-len", 24, "--no-bm25", "--output", output]
    dream("evaluate", path, tmp_path / "beir", *options)
    recorded = read_evaluations(config.output_dir)[-1]
    assert Path(recorded.model) == path and recorded.settings["metric"] == "nDCG@10"
    assert dream("compare-runs", config.output_dir, output).count("0/6/0") == 1

    # The same folder with one text changed is another task.
    corpus = tmp_path / "beir" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows[0]["text"] += " and more"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    dream("evaluate", path, tmp_path / "beir", *options)
    with pytest.raises(ValueError, match="documents_digest is"):
        dream("compare-runs", config.output_dir, output)


def test_a_report_does_not_compare_runs_over_other_data(run, tmp_path: Path) -> None:
    folders = []
    for count in (24, 25):
        data, beir = write_tiny_data(_made(tmp_path / str(count)), count)
        config = run(
            train_data=str(data), eval_data=str(beir), output_dir=str(tmp_path / f"run{count}"),
            max_steps=2,
        )  # fmt: skip
        train(config)
        folders.append(config.output_dir)
    dream("report", *folders, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "24" / "beir") in page and str(tmp_path / "25" / "beir") in page

    text = (tmp_path / "run25" / "evaluation.json").read_text()
    text = text.replace(str(tmp_path / "25"), str(tmp_path / "24"))
    (tmp_path / "run25" / "evaluation.json").write_text(text)
    dream("report", *folders, "--output", tmp_path / "report.html")
    assert "other documents, documents_digest" in (tmp_path / "report.html").read_text()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
