"""The folder of a run: refused, replaced, locked; and a ``best/`` in every one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from dream_kernels import HeadFile, write_heads
from dream_training.comparisons.objectives import Comparison, run_comparison
from dream_training.demo import run_demo
from dream_training.evaluation import RetrievalEvaluator, read_evaluations
from dream_training.history import History, describe_best
from dream_training.training.driver import train
from dream_training.training.output_folder import claimed, remove_run
from helpers.tiny import quiet

pytestmark = pytest.mark.long


@pytest.fixture
def scored(monkeypatch):
    """Evaluations return given scores, one after the other."""

    def use(*scores: float) -> None:
        left = list(scores)

        def evaluate(self, model, *args, **kwargs):
            self.query_scores = {"q0": {"ndcg_at_10": left[0], "recall_at_10": 0.5}}
            return {"ndcg_at_10": left.pop(0), "recall_at_10": 0.5}

        monkeypatch.setattr(RetrievalEvaluator, "__call__", evaluate)

    return use


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_second_run_is_refused_and_an_overwriting_one_leaves_nothing_of_the_first(
    run, tmp_path: Path, scored
) -> None:
    out = tmp_path / "out"
    scored(0.1, 0.5, 0.3)
    train(run(), console=quiet())
    (out / "faults").mkdir()
    (out / "faults" / "step-1.jsonl").write_text("{}")
    before = {name: (out / name).read_bytes() for name in files(out)}
    with pytest.raises(
        FileExistsError,
        match=rf"output_dir {out} has results of an earlier run \(best/, last/, checkpoints/, "
        r"history.json, evaluation.json, examples.json\): use --resume to continue after step 4, "
        "--overwrite to delete them, or another output_dir",
    ):
        train(run(learning_rate=1e-3), console=quiet())
    assert {name: (out / name).read_bytes() for name in files(out)} == before

    mine = ("notes.txt", "best.txt", "faults/why.txt", "checkpoints/old/model.bin")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    scored(0.2)
    changes = {"objective": "infonce", "eval_data": None, "report_queries": 0, "save_steps": 0}
    train(run(**changes), console=quiet(), overwrite=True)
    left = files(out)
    for name in mine:
        left.remove(name)
        assert (out / name).read_text() == "mine"
    others = {name for name in left if not name.startswith(("best/", "last/"))}
    assert others == {"config.json", "history.json", "curve.png", "environment.json"}
    assert weights(out / "best") == weights(out / "last") != before["best/model.safetensors"]


def test_what_fails_before_the_first_step_costs_nothing(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(run(save_steps=0), console=quiet())
    before = {name: (out / name).read_bytes() for name in files(out)}
    heads = write_heads(tmp_path / "big.yaml", HeadFile([(7, 0)]))
    for changes in ({"heads": str(tmp_path / "none.yaml")}, {"retriever": str(tmp_path / "none")}):
        with pytest.raises(Exception, match="none"):
            train(run(**changes), console=quiet(), overwrite=True)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert heads.exists()


def test_a_run_does_not_replace_what_it_reads(run, tmp_path: Path) -> None:
    train(run(save_steps=0), console=quiet())
    best = str(tmp_path / "out" / "best")
    with pytest.raises(ValueError, match=f"retriever {best} is what a run in output_dir .* replac"):
        train(run(retriever=best, retriever_layers=None), console=quiet(), overwrite=True)
    with pytest.raises(FileExistsError, match="there is no checkpoint to resume from: use --overw"):
        train(run(), console=quiet(), resume=True)
    assert (tmp_path / "out" / "best" / "model.safetensors").exists()


def test_a_linked_folder_is_written_through(run, tmp_path: Path) -> None:
    real, link, far = tmp_path / "real", tmp_path / "link", tmp_path / "far"
    real.mkdir()
    far.mkdir()
    link.symlink_to(real)
    (real / "last").symlink_to(far / "last")
    for overwrite in (False, True):
        config = run(output_dir=str(link), max_steps=1, eval_data=None, report_queries=0)
        train(config, console=quiet(), overwrite=overwrite)
        assert link.is_symlink() and (real / "last").is_symlink()
        assert weights(far / "last") == weights(real / "best")
    remove_run(link)
    assert link.is_symlink() and list(far.iterdir()) == []


def test_two_runs_in_one_folder(run, tmp_path: Path) -> None:
    """The second is refused, in this process and in another; a killed one blocks nobody."""
    out = tmp_path / "out"
    script = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from dream_training.training.output_folder import claimed\n"
        "with claimed(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"  # a worker process that outlives the run
        "    if child: print(child, flush=True)\n"
        "    signal.pause()\n"
    )
    out.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    child = int(other.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"{out} is in use by process {other.pid} on "):
            train(run(), console=quiet(), overwrite=True)
        assert files(out) == {".lock"}
        other.send_signal(signal.SIGKILL)
        other.wait()

        class Second(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs) -> None:
                with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on "):
                    train(run(), console=quiet(), overwrite=True)
                seen.append(state.global_step)

        seen: list[int] = []
        train(run(max_steps=1, eval_data=None), console=quiet(), callbacks=[Second()])
        assert seen == [1] and not (out / ".lock").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        other.kill()
        other.stdout.close()


def test_a_system_without_locks_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("dream_training.training.output_folder.fcntl", None)
    with claimed(tmp_path):
        pass
    assert "no file locks here" in caplog.text and list(tmp_path.iterdir()) == []


def test_nothing_better_than_untrained(run, tmp_path: Path, scored) -> None:
    """``best/`` is then the untrained model, whose scores it gets."""
    scored(0.5, 0.4, 0.5)
    out = tmp_path / "out"
    result = train(run(), console=quiet())
    assert result.path == out / "best" and result.history.not_improved
    assert describe_best(result.history) == (
        "NOT BETTER THAN UNTRAINED: nDCG@10 0.5000 before training, at most 0.5000 after. best/ is "
        "the untrained model, last/ the trained one."
    )
    assert weights(out / "best") != weights(out / "last")
    untrained, best = read_evaluations(out)
    assert (untrained.model, best.model) == ("untrained", str(out / "best"))
    assert best.settings["step"] == 0 and best.ndcg_at_10 == 0.5
    again = train(run(), console=quiet(), resume=True)
    assert again.path == out / "best" and again.history.not_improved


@pytest.mark.parametrize("better", [True, False])
def test_an_evaluation_before_the_run_counts(run, tmp_path: Path, scored, better: bool) -> None:
    """As in the demo, whose untrained model is evaluated outside."""
    scored(0.6 if better else 0.4, 0.3)
    history = History(evaluations=[{"step": 0.0, "ndcg_at_10": 0.5, "recall_at_10": 0.5}])
    result = train(run(), console=quiet(), evaluate_first=False, history=history)
    assert result.history.best_step == (2 if better else 0)
    best = SentenceTransformer(str(result.path), device="cpu")
    last = SentenceTransformer(str(tmp_path / "out" / "last"), device="cpu")
    texts = ["x"]
    assert not torch.allclose(*(m.encode(texts, convert_to_tensor=True) for m in (best, last)))


def test_a_comparison_keeps_the_results_of_other_settings(run, tmp_path: Path) -> None:
    heads = write_heads(tmp_path / "heads.yaml", HeadFile([(2, 1), (0, 3)]))
    base = run(max_steps=1, eval_steps=9, report_queries=0, heads=str(heads), top_k=1)
    comparison = Comparison(base, {"a": {}})
    run_comparison(comparison, quiet())
    result = tmp_path / "out" / "a" / "seed0" / "result.json"
    first = json.loads(result.read_text())
    other = Comparison(base.with_changes(learning_rate=0.5), {"a": {}})
    with pytest.raises(FileExistsError, match=r"learning_rate 0.01, now 0.5: use --overwrite"):
        run_comparison(other, quiet())
    write_heads(heads, HeadFile([(1, 0), (0, 3)]))
    with pytest.raises(FileExistsError, match=r"other heads than .*heads.yaml has now"):
        run_comparison(comparison, quiet())
    assert json.loads(result.read_text()) == first
    run_comparison(comparison, quiet(), overwrite=True)
    assert json.loads(result.read_text())["seconds"] != first["seconds"]


def test_the_demo_replaces_only_demos(run, tmp_path: Path) -> None:
    train(run(max_steps=1, eval_data=None), console=quiet())
    before = files(tmp_path / "out")
    with pytest.raises(FileExistsError, match="has results of another run than the demo's"):
        run_demo(tmp_path / "out")
    assert files(tmp_path / "out") == before
