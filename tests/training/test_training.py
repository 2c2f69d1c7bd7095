"""The driver end to end on tiny models, and on real data on request."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from dream_kernels import HeadFile, read_heads, write_heads
from dream_training.choices import OBJECTIVES
from dream_training.config import TrainConfig
from dream_training.data.beir_folder import read_beir_folder
from dream_training.data.jsonl import to_training_data
from dream_training.evaluation import RetrievalEvaluator, RetrievalTask
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.preflight.diagnosis import diagnose
from dream_training.preflight.dry_run import dry_run
from dream_training.reading.reader import Reader
from dream_training.report.run_folder import read_run
from dream_training.training import inputs
from dream_training.training.driver import train
from dream_training.training.inputs import find_heads, load_training_data
from helpers.tiny import make_rows, quiet


def test_a_run_writes_everything(run, tmp_path: Path) -> None:
    console = quiet()
    result = train(run(), console=console)
    out = tmp_path / "out"
    assert not result.interrupted
    assert [s["step"] for s in result.history.steps] == [1, 2, 3, 4]
    assert [e["step"] for e in result.history.evaluations] == [0, 2, 4]
    names = {p.name for p in out.iterdir()}
    assert names >= {"last", "heads.yaml", "heads.png", "config.json", "history.json", "curve.png"}
    assert not [name for name in names if name.startswith(".")], "temporary files remain"
    loaded = SentenceTransformer(str(result.path), device="cpu")
    assert loaded.encode(["x"]).shape == (1, 32)
    heads = read_heads(out / "heads.yaml")
    assert len(heads.heads) == 12 and heads.provenance["examples"] == 24
    assert json.loads((out / "history.json").read_text())["steps"][0]["loss"] > 0
    printed = console.file.getvalue()
    assert "step 2/4  loss " in printed and "on positive" in printed
    assert "entropy" in printed and "tokens/s" in printed


def test_what_is_evaluated_is_what_is_saved(run, monkeypatch) -> None:
    seen = []

    def evaluate(self, model, *args, **kwargs):
        seen.append(model.encode(["a", "b and c"]))
        return {"ndcg_at_10": len(seen) / 10, "recall_at_10": 0.0}

    monkeypatch.setattr(RetrievalEvaluator, "__call__", evaluate)
    changes = {"lora_r": 2, "dtype": "bfloat16", "learning_rate": 0.1, "trained_share": 0.9}
    result = train(run(**changes), console=quiet())
    # transformers 4.57 would load float32.
    options = {"dtype": torch.bfloat16}
    loaded = SentenceTransformer(str(result.path), device="cpu", model_kwargs=options)
    saved = loaded.encode(["a", "b and c"])
    assert np.array_equal(seen[-1], saved), "adapters were not merged, or not as they are saved"
    assert not np.array_equal(seen[0], seen[-1])


@pytest.mark.parametrize("lora_r", (0, 2))
def test_models_keep_the_wanted_share_of_what_was_learned(run, tmp_path: Path, lora_r) -> None:
    def weights(name: str, **changes: object) -> dict[str, torch.Tensor]:
        changes |= {"lora_r": lora_r, "output_dir": str(tmp_path / name), "report_queries": 0}
        result = train(run(dtype="float32", eval_data=None, **changes), console=quiet())
        return dict(SentenceTransformer(str(result.path), device="cpu").state_dict())

    start, whole = weights("start", learning_rate=1e-30), weights("whole")
    part = weights("part", trained_share=0.25)
    for name, weight in part.items():
        torch.testing.assert_close(weight, start[name].lerp(whole[name], 0.25), rtol=0, atol=1e-6)
    assert any(not torch.allclose(part[name], whole[name], atol=1e-4) for name in part)


def test_a_share_needs_whole_weights(run) -> None:
    with pytest.raises(ValueError, match="trained_share must be above 0 and at most 1, got 0"):
        run(trained_share=0)
    with pytest.raises(ValueError, match=r"trained_share must be 1 with fsdp, .*got 0.5"):
        run(trained_share=0.5, fsdp=True)


def test_pictures_are_not_blank(run, tmp_path: Path) -> None:
    train(run(), console=quiet())
    for name in ("heads.png", "curve.png"):
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10 and len(np.unique(pixels)) > 50


def test_the_same_seed_gives_the_same_run(run) -> None:
    losses, scores = [], []
    for _ in range(2):
        history = train(run(), console=quiet(), overwrite=True).history
        losses.append([s["loss"] for s in history.steps])
        scores.append([e["ndcg_at_10"] for e in history.evaluations])
    assert losses[0] == losses[1] and scores[0] == scores[1]
    other = train(run(seed=1), console=quiet(), overwrite=True).history
    assert [s["loss"] for s in other.steps] != losses[0]


def test_best_is_the_best_evaluation(run, tmp_path: Path, monkeypatch) -> None:
    """The scores are set from outside, so that the middle evaluation is the best."""
    scores = iter([0.1, 0.5, 0.3])
    seen = []

    def evaluate(self, model, *args, **kwargs):
        seen.append(model.encode(["x"], convert_to_tensor=True).clone())
        return {"ndcg_at_10": next(scores), "recall_at_10": 0.5}

    monkeypatch.setattr(RetrievalEvaluator, "__call__", evaluate)
    result = train(run(), console=quiet())
    assert result.path == tmp_path / "out" / "best"
    best = SentenceTransformer(str(result.path), device="cpu")
    last = SentenceTransformer(str(tmp_path / "out" / "last"), device="cpu")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(best.encode(["x"], convert_to_tensor=True), seen[1], **close)
    torch.testing.assert_close(last.encode(["x"], convert_to_tensor=True), seen[2], **close)
    assert not torch.allclose(seen[1], seen[2], **close)


def test_ctrl_c_keeps_the_last_model_and_says_where(run, tmp_path: Path, monkeypatch) -> None:
    original = DistilledDreamLoss.forward
    calls = []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistilledDreamLoss, "forward", forward)
    console = quiet()
    result = train(run(eval_data=None), console=console)
    assert result.interrupted and result.path == tmp_path / "out" / "best"
    assert f"Interrupted after 3 steps; the retriever is in {result.path}" in " ".join(
        console.file.getvalue().split()
    )
    SentenceTransformer(str(result.path), device="cpu")


def test_a_head_file_is_used_as_it_is(run, tmp_path: Path) -> None:
    path = write_heads(tmp_path / "my.yaml", HeadFile([(2, 1), (0, 3)]))
    train(run(heads=str(path), top_k=1, eval_data=None), console=quiet())
    assert read_heads(tmp_path / "out" / "heads.yaml").heads == [(2, 1)]


def test_the_heads_that_a_file_chose_are_those_of_a_run(run, tmp_path: Path, tiny_model) -> None:
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    ranking = HeadFile(heads, {head: 0.5 - i for i, head in enumerate(heads)})
    path, out = tmp_path / "my.yaml", tmp_path / "out" / "heads.yaml"
    write_heads(path, ranking.choose(2))
    config = run(heads=str(path), top_k=None, eval_data=None, max_steps=1)
    for top_k, chosen in ((None, {0: [0, 1]}), (5, {0: [0, 1, 2, 3], 1: [0]})):
        train(config.with_changes(top_k=top_k), console=quiet(), overwrite=True)
        assert read_heads(out).by_layer() == chosen
        assert read_run(out.parent).top_k == (top_k or 2)
    # As the README loads it.
    assert Reader.from_pretrained(tiny_model, heads=path).injection.heads == {0: [0, 1]}
    assert Reader.from_pretrained(tiny_model, heads=path, top_k=1).injection.heads == {0: [0]}
    assert dry_run(config, quiet()).steps == 1
    write_heads(path, ranking)
    message = "my.yaml: the heads are a ranking of 12 in which none are chosen"
    with pytest.raises(ValueError, match=message):
        train(config, console=quiet(), overwrite=True)
    with pytest.raises(ValueError, match=message):
        dry_run(config, quiet())
    assert message in diagnose(config)[0].figure


def test_without_top_k_a_run_chooses_sixteen_heads(run, monkeypatch) -> None:
    config = run(top_k=None)
    data = load_training_data(config.data, config.run.seed)
    assert find_heads(config, data, 4).chosen == 12, "all that there are"
    many = [(0, head) for head in range(40)]
    ranking = HeadFile(many, dict.fromkeys(many, 0.0))
    monkeypatch.setattr(inputs, "select_heads", lambda *_, **__: ranking)
    assert find_heads(config, data, 4).chosen == 16


def test_infonce_runs_on_the_same_data(run) -> None:
    history = train(run(objective="infonce"), console=quiet()).history
    losses = [s["loss"] for s in history.steps]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


def test_the_reader_may_read_more_of_a_document_than_the_retriever(run) -> None:
    """Documents of 5 tokens for both, of 30 for the reader, and of 30 for both."""
    losses, weights = [], []
    for own, reader in ((5, None), (5, 30), (30, None)):
        config = run(passage_max_len=own, reader_passage_max_len=reader, eval_data=None)
        step = train(config, console=quiet(), overwrite=True).history.steps[0]
        losses.append(step["loss"])
        weights.append(step["entropy"])
    assert weights[0] == weights[1] != weights[2], "the retriever reads passage_max_len tokens"
    assert len(set(losses)) == 3


@pytest.mark.parametrize("objective", [*OBJECTIVES, "direct"])
def test_mini_batches_change_no_step(run, objective: str) -> None:
    losses = []
    own = {"teaching": objective} if objective == "direct" else {"objective": objective}
    for size in (None, 3):
        changes = {**own, "mini_batch_size": size, "eval_data": None}
        history = train(run(**changes), console=quiet(), overwrite=True).history
        losses.append([s["loss"] for s in history.steps])
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_mistakes_are_named(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one batch of 32 lines, got 24"):
        train(run(batch_size=32), console=quiet())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(run(train_data=str(tmp_path / "nowhere.jsonl")), console=quiet())
    unlabelled = tmp_path / "unlabelled.jsonl"
    rows = [{**row, "positive": None} for row in make_rows(8)]
    unlabelled.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="training lines with a known positive, and there are 0"):
        train(run(train_data=str(unlabelled), head_criterion="qr_mass"), console=quiet())
    with pytest.raises(ValueError, match="'infonce' needs known positives"):
        train(run(train_data=str(unlabelled), objective="infonce"), console=quiet())
    heads = write_heads(tmp_path / "big.yaml", HeadFile([(7, 0)]))
    with pytest.raises(ValueError, match="layer 7, and the model has"):
        train(run(heads=str(heads), top_k=None), console=quiet())


@pytest.mark.parametrize("streaming", [False, True])
def test_other_forms_are_trained_on(run, tmp_path: Path, streaming: bool) -> None:
    data = tmp_path / "flag.jsonl"
    lines = [{"query": r["query"], "pos": r["documents"], "neg": ["none"]} for r in make_rows(9)]
    data.write_text("\n".join(map(json.dumps, lines)))
    config = run(train_data=str(data), streaming=streaming, eval_data=None, target_from="positive")
    result = train(config, console=quiet())
    # Two batches of four in nine lines: the fourth step is in the second epoch.
    assert [s["step"] for s in result.history.steps] == [1, 2, 3, 4]
    assert all(s["weight_on_positive"] > 0 for s in result.history.steps)
    assert read_heads(tmp_path / "out" / "heads.yaml").provenance["examples"] == 9


@pytest.mark.slow
def test_fifty_steps_on_natural_questions(nq_oracle: Path, tmp_path: Path) -> None:
    """A frozen SmolLM2 teaches its own first layers: nDCG@10 at least 0.35 on unseen queries."""
    pytest.importorskip("gguf")
    corpus, queries, qrels = read_beir_folder(nq_oracle, "test")
    _, train_queries, train_qrels = read_beir_folder(nq_oracle, "train")
    # The passages of the test queries, among others up to 1,122 in all.
    relevant = {passage for passages in qrels.values() for passage in passages}
    others = [passage for passage in sorted(corpus) if passage not in relevant]
    chosen = sorted(relevant) + others[: 1122 - len(relevant)]
    task = RetrievalTask(queries, {passage: corpus[passage] for passage in chosen}, qrels)
    with (nq_oracle / "qa.jsonl").open(encoding="utf-8") as lines:
        targets = {row["query_id"]: row["target"] for row in map(json.loads, lines)}
    data = to_training_data(
        (query, targets[q], corpus[next(iter(train_qrels[q]))])
        for q, query in train_queries.items()
    )
    config = TrainConfig(
        reader="smollm2",
        retriever="smollm2",
        retriever_layers=10,
        train_data="nq_oracle",
        top_k=64,
        passage_max_len=64,
        query_max_len=24,
        target_max_len=16,
        learning_rate=1e-3,
        warmup_steps=5,
        max_steps=50,
        eval_steps=50,
        output_dir=str(tmp_path / "out"),
    )
    evaluator = RetrievalEvaluator(task, config.query_max_len, config.passage_max_len)
    history = train(config, data=data, evaluator=evaluator, evaluate_first=False).history
    assert len(task.corpus) >= 1000 and len(task.queries) == 600
    assert history.evaluations[-1]["ndcg_at_10"] >= 0.35
