"""The doctor passes what is sound, and names what is broken on purpose."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from dream_kernels import HeadFile, write_heads
from dream_training.cli import app
from dream_training.heads.contrast import Contrast, measure_contrast, single_document_losses
from dream_training.heads.selection import HeadExample
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.preflight import reader_checks
from dream_training.preflight.check import FAULT, OK, WARNING, Check
from dream_training.preflight.diagnosis import diagnose, has_fault
from dream_training.preflight.retriever_checks import of_similarity, part_of
from dream_training.reading.reader import Reader
from helpers.tiny import make_decoder, make_rows, make_tokenizer, retriever_of

QUERIES = 8


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def contrast(right: float, uniform: float, wrong: float, noise: float = 0.1) -> Contrast:
    own = noise * torch.linspace(-1, 1, QUERIES)
    levels = [torch.full((QUERIES,), level) for level in (uniform, wrong, uniform)]
    return Contrast(right + own, *levels)


@pytest.fixture
def reader_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random reader cannot tell documents apart: use the losses of one that can."""
    monkeypatch.setattr(reader_checks, "measure_contrast", lambda *_: contrast(1.0, 2.0, 3.0))


def test_a_sound_run_passes(run, reader_that_reads) -> None:
    reported: list[Check] = []
    checks = diagnose(run(), report=reported.append)
    assert reported == checks
    assert {c.name: c.status for c in checks} == {
        **dict.fromkeys(("queries", "passages", "targets", "spans", "heads"), OK),
        **dict.fromkeys(("target loss", "weights", "gradient", "time and memory"), OK),
    }
    found = by_name(checks)
    assert (
        "0% cut by the retriever, 0% cut by the reader, at 128 tokens" in found["passages"].figure
    )
    assert "4 of 4 decode" in found["spans"].figure
    assert "every part gets some" in found["gradient"].figure
    assert "for 4 steps and" in found["time and memory"].figure
    assert "for 3 evaluations" in found["time and memory"].figure
    assert not has_fault(checks)


def test_data_is_read_as_the_config_says(run, tmp_path: Path, reader_that_reads) -> None:
    data = tmp_path / "flag.jsonl"
    lines = [{"query": row["query"], "pos": row["documents"]} for row in make_rows(8)]
    data.write_text("\n".join(map(json.dumps, lines)))
    config = run(train_data=str(data), target_from="positive", streaming=True)
    assert by_name(diagnose(config))["targets"].status == OK
    with pytest.raises(ValueError, match="has no target; say with target_from"):
        diagnose(run(train_data=str(data)))


def test_a_random_reader_teaches_nothing(run) -> None:
    found = by_name(diagnose(run()))
    assert found["target loss"].status == FAULT
    assert "choose other heads" in found["target loss"].advice


@pytest.mark.parametrize(
    "losses, status",
    [
        (contrast(1.0, 2.0, 3.0), OK),
        (contrast(2.0, 2.0, 3.0), WARNING),
        (contrast(2.0, 2.0, 2.0), FAULT),
        (contrast(3.0, 2.0, 1.0), FAULT),
        (contrast(2.0, 2.3, 2.5, noise=3.0), FAULT),
    ],
    ids=("sound", "no better than uniform", "all equal", "upside down", "noise"),
)
def test_the_losses_must_tell_documents_apart(losses: Contrast, status: str) -> None:
    check = reader_checks.of_contrast(losses)
    assert check.status == status and bool(check.advice) == (status != OK)
    assert f"{losses.means()['wrong']:.3f} on a wrong one" in check.figure


def test_the_contrast_is_that_of_the_readers_own_losses() -> None:
    reader = Reader(make_decoder(), make_tokenizer(), {1: [0, 3]})
    rows = make_rows(5)
    examples = [HeadExample(r["query"], r["target"], tuple(r["documents"]), 0) for r in rows]
    found = measure_contrast(reader, examples, pool_size=5)
    documents = [e.gold for e in examples]
    alone = single_document_losses(
        reader, [e.query for e in examples], [e.target for e in examples], documents
    )
    torch.testing.assert_close(found.right, alone.diagonal(), rtol=1e-5, atol=1e-5)
    wrong = alone[torch.arange(5), (torch.arange(5) + 1) % 5]
    torch.testing.assert_close(found.wrong, wrong, rtol=1e-5, atol=1e-5)
    # Nothing of the other documents is left where all weight is on one.
    weights = torch.full((5, 5), -torch.inf).fill_diagonal_(0.0)
    reading = reader(
        reader.read(documents), [e.query for e in examples], [e.target for e in examples], weights
    )
    torch.testing.assert_close(found.right, reading.query_losses, rtol=1e-6, atol=1e-6)
    assert reader.injection.heads == {1: [0, 3]}
    reader.injection.use_heads({})
    plain = measure_contrast(reader, examples, pool_size=5)
    torch.testing.assert_close(found.plain, plain.wrong, rtol=1e-6, atol=1e-6)
    assert (found.plain - found.right).abs().max() > 1e-2


def test_without_known_positives_single_documents_are_compared(run, tmp_path: Path) -> None:
    path = tmp_path / "unlabelled.jsonl"
    path.write_text("\n".join(json.dumps({**row, "positive": None}) for row in make_rows(8)))
    found = by_name(diagnose(run(train_data=str(path), head_criterion="loss_gradient")))
    assert found["target loss"].status == OK
    assert "no positives known" in found["target loss"].figure


@pytest.mark.parametrize(
    "temperature, words", [(1e-6, "one-hot at the start: raise"), (100.0, "flat whatever")]
)
def test_weights_that_cannot_learn_are_a_fault(run, temperature: float, words: str) -> None:
    check = by_name(diagnose(run(temperature=temperature)))["weights"]
    assert check.status == FAULT and words in check.advice
    assert f"temperature {temperature:g}," in check.figure


@pytest.mark.parametrize(
    "pool, options, documents",
    [
        ("both", {}, 12),
        ("both", {"documents_per_query": 2}, 8),
        ("in_batch", {}, 4),
        ("mined", {}, 3),
    ],
)
def test_weights_are_those_of_the_pool(
    run, tmp_path: Path, pool: str, options: dict, documents: int
) -> None:
    lines = [
        {**row, "documents": [row["documents"][0], f"one beside {i}", f"another {i}"]}
        for i, row in enumerate(make_rows(4))
    ]
    path = tmp_path / "candidates.jsonl"
    path.write_text("\n".join(json.dumps({**line, "positive": True}) for line in lines))
    config = run(objective="infonce", train_data=str(path), pool=pool, **options)
    assert f"over {documents} documents" in by_name(diagnose(config))["weights"].figure


def test_a_small_pool_is_measured_by_its_own_uniform_weights() -> None:
    similarity = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -torch.inf, -torch.inf]])
    assert "entropy 1.00 of" in of_similarity(similarity, 0.1).figure
    alone = torch.tensor([[0.5, 0.5], [0.5, -torch.inf]])
    assert "entropy 1.00 of" in of_similarity(alone, 0.1).figure


def test_a_pool_without_its_candidates_is_a_fault(run) -> None:
    checks = diagnose(run(pool="mined"))
    assert (checks[-1].name, checks[-1].status) == ("pool", FAULT)
    assert "at least two candidates" in checks[-1].figure


def test_the_suggested_temperature_gives_the_stated_entropy() -> None:
    similarity = 0.3 * torch.randn(6, 12)
    named = float(of_similarity(similarity, 1e-6).advice.split()[-1])
    weights = torch.softmax(similarity / named, -1)
    share = torch.special.entr(weights).sum(-1).mean() / torch.tensor(12.0).log()
    assert share.item() == pytest.approx(0.9, abs=0.01)
    assert of_similarity(similarity, named).status == OK


def test_heads_that_look_elsewhere_are_a_fault() -> None:
    """Every token attends to the first one in two heads."""
    model = make_decoder(attention_bias=True)
    embeddings, attention = model.model.embed_tokens.weight.data, model.model.layers[0].self_attn
    embeddings[:, 0] = 0.0
    embeddings[1] = 0.0
    embeddings[1, 0] = 1.0
    # The rotation of the last pair is the slowest: it hardly turns within the context.
    attention.k_proj.weight.data[3] = 0.0
    attention.k_proj.weight.data[3, 0] = 1.0
    attention.q_proj.bias.data.view(4, 8)[:2, 3] = 100.0
    examples = [
        HeadExample(r["query"], r["target"], tuple(r["documents"]), 0) for r in make_rows(4)
    ]
    blind = reader_checks.heads(Reader(model, make_tokenizer(), {0: [0, 1]}), examples)
    assert blind.status == FAULT and "give the documents 0.0%" in blind.figure
    assert "document_mass" in blind.advice
    seeing = reader_checks.heads(Reader(make_decoder(), make_tokenizer(), {0: [2, 3]}), examples)
    assert seeing.status == OK


@pytest.mark.parametrize("chosen", (True, False), ids=("named", "auto"))
def test_a_window_that_documents_do_not_fit_is_a_fault(run, tmp_path: Path, chosen: bool) -> None:
    sizes = make_decoder().config.to_dict()
    del sizes["model_type"]
    reader = tmp_path / "reader"
    MistralForCausalLM(MistralConfig(**{**sizes, "sliding_window": 40})).save_pretrained(reader)
    make_tokenizer().save_pretrained(reader)
    heads = write_heads(tmp_path / "heads.yaml", HeadFile([(1, 0)])) if chosen else "auto"
    checks = by_name(diagnose(run(reader=str(reader), heads=str(heads), top_k=1)))
    found = [check for check in checks.values() if "sliding window of" in check.figure]
    names = ["target loss", "steps"] if chosen else ["heads"]
    assert [check.name for check in found] == names
    for check in found:
        assert check.status == FAULT
        assert "lower reader_passage_max_len" in check.advice


def test_heads_that_do_not_exist_are_a_fault(run, tmp_path: Path) -> None:
    path = write_heads(tmp_path / "heads.yaml", HeadFile([(9, 0)]))
    checks = diagnose(run(heads=str(path), top_k=1))
    assert [(c.name, c.status) for c in checks] == [("heads", FAULT)]
    assert "layer 9" in checks[0].figure


@pytest.mark.parametrize("context", ("joint", "independent"))
def test_spans_that_miss_the_documents_are_a_fault(context: str, monkeypatch) -> None:
    reader = Reader(make_decoder(), make_tokenizer(), {}, context=context, passage_max_len=9)
    documents = ["Ünïcödé stands here", "The second one", "x"]
    assert reader_checks.spans(reader, documents).status == OK
    original = reader.tokens.documents
    monkeypatch.setattr(
        reader.tokens, "documents", lambda texts: [ids[1:] for ids in original(texts)]
    )
    check = reader_checks.spans(reader, documents)
    assert check.status == FAULT and "do not decode" in check.figure


def test_a_frozen_retriever_is_a_fault(run) -> None:
    config = run()
    found = by_name(diagnose(config, model=retriever_of(config).requires_grad_(False)))
    assert found["gradient"].status == FAULT and "no parameter" in found["gradient"].figure


def test_a_gradient_that_is_not_finite_is_a_fault(run, monkeypatch) -> None:
    original = DistilledDreamLoss.forward

    def forward(*args, **kwargs):
        return original(*args, **kwargs) * float("nan")

    monkeypatch.setattr(DistilledDreamLoss, "forward", forward)
    check = by_name(diagnose(run()))["gradient"]
    assert check.status == FAULT and check.figure == "not finite in one of 2 steps"


def test_parts_without_gradient_are_named(run) -> None:
    config = run(lora_r=0)
    model = retriever_of(config)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    check = by_name(diagnose(config, model=model))["gradient"]
    assert check.status == WARNING and check.figure.endswith("none in unused")


def test_passages_cut_to_nothing_are_a_fault(run) -> None:
    found = by_name(diagnose(run(passage_max_len=1)))
    assert found["passages"].status == FAULT
    assert "100% cut by the retriever (the middle text keeps 0%)" in found["passages"].figure
    assert "raise passage_max_len" in found["passages"].advice
    found = by_name(diagnose(run(query_max_len=15)))
    assert found["queries"].status == WARNING


def test_other_objectives_are_examined_without_the_reader(run) -> None:
    checks = diagnose(run(objective="infonce"))
    assert [c.name for c in checks] == [
        "queries", "passages", "weights", "gradient", "time and memory"
    ]  # fmt: skip
    assert all(c.status == OK for c in checks)


@pytest.mark.parametrize(
    "name, part",
    [
        ("0.auto_model.layers.3.self_attn.q_proj.lora_A.default.weight", "layer 3 lora_A"),
        ("0.auto_model.layers.11.mlp.up_proj.weight", "layer 11"),
        ("0.auto_model.embed_tokens.weight", "auto_model.embed_tokens"),
    ],
)
def test_parts_of_the_model(name: str, part: str) -> None:
    assert part_of(name) == part


def test_the_command_prints_and_fails_on_a_fault(run, tmp_path: Path, reader_that_reads) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(run())))
    sound = CliRunner().invoke(app, ["doctor", str(path)])
    assert sound.exit_code == 0, sound.output
    assert "ok      gradient " in sound.output and "This run can learn." in sound.output
    broken = CliRunner().invoke(app, ["doctor", str(path), "temperature=100"])
    assert broken.exit_code == 1
    assert "fault   weights " in broken.output and "-> flat whatever" in broken.output
    assert "This run should not be started: 1 at fault." in broken.output
    assert not (tmp_path / "out").exists(), "the doctor leaves nothing behind"
