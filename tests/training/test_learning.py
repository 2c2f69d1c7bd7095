"""A run or a loss that cannot train anything says so, before the run if that can be known."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import nn
from transformers import TrainerCallback
from typer.testing import CliRunner

from dream_kernels import HeadFile, write_heads
from dream_training.cli import app
from dream_training.models.retriever import build_retriever
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.embedding import draws_random_numbers
from dream_training.preflight.check import FAULT
from dream_training.preflight.diagnosis import diagnose
from dream_training.reading.reader import Reader
from dream_training.training.driver import train
from dream_training.training.inputs import make_evaluator
from helpers.tiny import make_decoder, make_rows, make_tokenizer, quiet, retriever_of


def rows_of(documents: list[str], count: int = 24) -> list[dict]:
    """Rows that share the documents between them."""
    return [
        {**row, "documents": [documents[i % len(documents)]]}
        for i, row in enumerate(make_rows(count))
    ]


EIGHT = rows_of([f"number {i}" for i in range(8)])
PAIRS = [{**row, "documents": [f"the {i // 2}."]} for i, row in enumerate(make_rows(24))]
SHARED = [{**row, "documents": [*row["documents"], "the same"]} for row in make_rows(24)]
FEW_LABELS = [{**row, "positive": 0 if i < 3 else -1} for i, row in enumerate(make_rows(24))]
ONE = "train_data must hold at least two distinct documents"


@pytest.fixture
def on(run, tmp_path: Path):
    """A config on rows."""

    def make(rows: list[dict], **changes):
        data, heads = tmp_path / "rows.jsonl", tmp_path / "chosen.yaml"
        data.write_text("\n".join(map(json.dumps, rows)))
        write_heads(heads, HeadFile(heads=[(0, 1), (1, 3)]))
        own = {"train_data": str(data), "heads": str(heads), "eval_data": None, "top_k": None}
        return run(**{**own, **changes})

    return make


@pytest.mark.parametrize(
    "rows, changes, said",
    [
        (EIGHT, {"batch_size": 12}, "24 lines .* 8 distinct .* Lower batch_size to 8 or less"),
        (SHARED, {}, "24 distinct relevant documents. Set pool: in_batch"),
        (FEW_LABELS, {}, "at least one batch of 4 lines with one, and 3 of 24 lines"),
        (rows_of(["alone"]), {}, ONE),
        (rows_of(["alone"]), {"objective": "dream"}, ONE),
        (rows_of(["alone"]), {"objective": "revela", "pool": "in_batch"}, ONE),
        (make_rows(6), {"gradient_accumulation_steps": 2}, "2 batches of 4 lines, got 6"),
    ],
)
def test_data_that_makes_no_step_is_found_before_the_run(on, rows, changes, said) -> None:
    config = on(rows, **{"objective": "infonce", **changes})
    with pytest.raises(ValueError, match=said) as raised:
        train(config, console=quiet())
    assert not Path(config.output_dir, "last").exists()
    (check,) = diagnose(config)
    assert (check.name, check.status, check.figure) == ("batches", FAULT, str(raised.value))


def test_the_command_fails_too(on, tmp_path: Path) -> None:
    keys = on(EIGHT, objective="infonce", batch_size=12).flat()
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({k: v for k, v in keys.items() if v is not None}))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code != 0 and "batch_size 12 cannot be filled" in str(result.exception)


def test_lines_may_share_a_document_in_the_pool_that_the_error_names(on) -> None:
    config = on(EIGHT, objective="infonce", batch_size=12, pool="in_batch", max_steps=2)
    steps = train(config, console=quiet()).history.steps
    assert len(steps) == 2 and steps[0]["loss"] > 0


class StopsAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= 2


def test_a_run_that_makes_fewer_steps_says_so(on) -> None:
    console = quiet()
    train(on(make_rows(24), eval_steps=4), console=console, callbacks=[StopsAfterTwo()])
    printed = console.file.getvalue()
    assert "The run ended after 2 of 4 steps" in printed and "learnt" not in printed


def test_a_stream_without_a_batch_is_an_error(on) -> None:
    stream = Dataset.from_list(make_rows(3)).to_iterable_dataset()
    config = on(make_rows(24))
    with pytest.raises(ValueError, match=r"no step was made: train_data .* no batch of 4 lines"):
        train(config, data=stream, console=quiet())
    assert not Path(config.output_dir, "last").exists()


@pytest.mark.parametrize(
    "objective, changes",
    [
        ("dream", {"teaching": "direct"}),
        ("dream", {"teaching": "distilled"}),
        ("replug", {}),
        ("emdr", {}),
        ("revela", {"pool": "in_batch"}),
    ],
)
def test_gradients_that_are_all_zero_are_reported(on, objective: str, changes: dict) -> None:
    """Two queries a batch share one document; each of Revela's two texts has one other."""
    rows = make_rows(24) if objective == "revela" else PAIRS
    console = quiet()
    config = on(rows, objective=objective, batch_size=2, max_steps=6, **changes)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.warns(UserWarning, match="no gradient: in each of the first 5 batches"):
        train(config, data=stream, console=console)
    printed = console.file.getvalue()
    assert "every gradient of the 5 steps so far was exactly zero" in printed
    assert "every gradient of the 6 steps so far" in printed


def test_the_doctor_names_a_batch_without_a_choice(on) -> None:
    config = on([*rows_of(["alone"], 200), *make_rows(2)], objective="replug", batch_size=2)
    found = {check.name: check for check in diagnose(config)}
    assert found["weights"].status == FAULT
    assert "one document to choose from" in found["weights"].figure


def arguments(folder: Path, **options) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip


def make_loss(folder: Path, dtype: torch.dtype = torch.float32) -> DreamLoss:
    model = build_retriever(folder, layers=2, dtype="float32", device="cpu").to(dtype)
    return DreamLoss(model, Reader(make_decoder(), make_tokenizer(), {0: [1], 1: [0, 3]}))


class CountingCollator(DreamCollator):
    sizes: list[int]

    def __call__(self, rows: list[dict]) -> dict:
        self.sizes.append(len(rows))
        return super().__call__(rows)


@pytest.mark.parametrize("sampler", ("batch_sampler", "no_duplicates"))
def test_a_plain_trainer_fills_its_batches(tiny_model, tmp_path: Path, sampler: str) -> None:
    """With the columns of the README; the label's number is in every row."""
    loss = make_loss(tiny_model)
    collator = CountingCollator(loss.model)
    collator.sizes = []
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4, batch_sampler=sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "(?!DreamLoss)")
        SentenceTransformerTrainer(
            model=loss.model, args=args, train_dataset=Dataset.from_list(make_rows(12)),
            loss=loss, data_collator=collator,
        ).train()  # fmt: skip
    assert set(collator.sizes) == {4}


@pytest.mark.parametrize("dtype, warned", [(torch.bfloat16, True), (torch.float32, False)])
def test_a_plain_trainer_is_warned_of_weights_in_16_bits(tiny_model, dtype, warned: bool) -> None:
    loss = make_loss(tiny_model, dtype)
    batch = DreamCollator(loss.model)(make_rows(4))
    features = [
        {k.removeprefix(p): v for k, v in batch.items() if k.startswith(p)}
        for p in ("query_", "document_")
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            loss(features)
        assert not caught, "an evaluation trains nothing"
        loss(features)
        loss(features)
    said = [str(w.message) for w in caught if "DreamLoss" in str(w.message)]
    assert len(said) == warned
    assert not warned or "trains weights in bfloat16" in said[0]


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_every_weight_is_trained_in_float32(run, dtype: str) -> None:
    """At a learning rate of 1e-5, whose steps a weight in bfloat16 rounds away."""
    config = run(
        lora_r=0, dtype=dtype, learning_rate=1e-5, warmup_steps=0, max_steps=10, eval_steps=10,
        objective="infonce",
    )  # fmt: skip
    before = [p.detach().clone() for p in retriever_of(config).parameters()]
    result = train(config, console=quiet())
    after = list(result.model.parameters())
    assert {p.dtype for p in after} == {torch.float32}
    # Of the byte tokenizer's 259 embeddings a part is not in the data.
    moved = [(a != b).sum().item() / a.numel() for a, b in zip(after, before) if len(a) != 259]
    assert min(moved) > 0.5
    saved = SentenceTransformer(str(result.path), device="cpu", model_kwargs={"dtype": "auto"})
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    figure = make_evaluator(config.evaluation, config.run.seed)(saved)["ndcg_at_10"]
    assert figure == result.history.evaluations[-1]["ndcg_at_10"]


def test_passes_of_training_compute_in_bfloat16(tiny_model) -> None:
    model = build_retriever(tiny_model, layers=2, dtype="bfloat16", device="cpu")
    seen: list[torch.dtype] = []
    layer = model[0].auto_model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    features = model.preprocess(["a text"])
    model.train()
    training = model(dict(features))["sentence_embedding"]
    model.eval()
    evaluated = model(dict(features))["sentence_embedding"]
    assert seen == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.equal(training, evaluated)
    torch.testing.assert_close(training, evaluated, rtol=0.05, atol=0.05)


def test_mini_batches_of_another_size_resume_only_without_dropout(run, monkeypatch) -> None:
    config = run(max_steps=2, mini_batch_size=2, eval_data=None)
    train(config, console=quiet())
    more = {"max_steps": 3, "eval_data": None}
    steps = train(run(mini_batch_size=3, **more), console=quiet(), resume=True).history.steps
    assert len(steps) == 3
    model = retriever_of(config)
    assert not draws_random_numbers(model)
    model[0].auto_model.layers[0].mlp.act_fn = nn.Dropout(0.1)
    before = torch.get_rng_state()
    assert draws_random_numbers(model) and torch.equal(torch.get_rng_state(), before)
    options = {"console": quiet(), "resume": True, "model": model}
    with pytest.raises(ValueError, match=r"mini_batch_size is 4, and .* written with 3.* dropout"):
        train(run(mini_batch_size=4, max_steps=4, eval_data=None), **options)
