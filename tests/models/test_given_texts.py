"""What the retriever is actually given, by every objective and command: prompt, length and pooling.

It must be what ``encode_query`` and ``encode_document`` of the saved model give it.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.models import Normalize, Pooling, Router, Transformer
from typer.testing import CliRunner

from dream_kernels import HeadFile
from dream_training.cli import app
from dream_training.comparisons.objectives import Comparison, run_comparison
from dream_training.data.beir_folder import write_beir_folder
from dream_training.demo.docstrings import RetrievalSplit
from dream_training.demo.measured import DemoEvaluator
from dream_training.evaluation import RetrievalTask, search
from dream_training.evaluation.mteb_tasks import evaluate_mteb_task, get_task
from dream_training.evaluation.options import EvaluationOptions
from dream_training.evaluation.results import read_evaluations
from dream_training.evaluation.tasks import evaluate_task, load_task
from dream_training.models import texts
from dream_training.models.retriever import load_sentence_transformer, save_retriever
from dream_training.models.texts import encode, prompt_of, text_features
from dream_training.objectives.collator import DreamCollator
from dream_training.objectives.infonce import PoolInfoNCELoss
from dream_training.preflight.diagnosis import diagnose
from dream_training.training.driver import train
from helpers.tiny import make_tokenizer, quiet, retriever_of

PROMPTS = {"query": "Q: ", "document": "D: "}
# Longer than most queries and documents, prompts included, and shorter.
LONG, LENGTHS = 200, {"query_max_len": 22, "passage_max_len": 34}

Given = set[tuple[str, int]]


def dream(*arguments: object) -> None:
    CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


def make_lines(count: int = 8) -> list[dict[str, Any]]:
    """Three documents a line, some of them longer than what is encoded."""
    return [
        {
            "query": f"Where is stone {i}" + ", and who has put it there" * (i % 2),
            "target": f"place {i}",
            "documents": [
                f"The stone {i} is at {i}",
                f"No stone is at {i}, whatever anybody says" * (1 + i % 2),
                f"Stone {i} was lost",
            ],
            "positive": i % 3,
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Training data, and a BEIR folder over the same texts."""
    lines = make_lines()
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = {f"d{i}-{j}": d for i, li in enumerate(lines) for j, d in enumerate(li["documents"])}
    queries = {f"q{i}": line["query"] for i, line in enumerate(lines)}
    qrels = {f"q{i}": {f"d{i}-{line['positive']}": 1} for i, line in enumerate(lines)}
    write_beir_folder(tmp_path / "set", corpus, {"test": RetrievalSplit(queries, qrels)})
    return {"train_data": str(tmp_path / "lines.jsonl"), "eval_data": str(tmp_path / "set")}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retriever with prompts, which its pooling leaves out."""
    folder = tmp_path_factory.mktemp("base")
    make_model(tiny_model, prompts=PROMPTS).save_pretrained(str(folder))
    return folder


def make_model(tiny_model: Path, **options: Any) -> SentenceTransformer:
    transformer = Transformer(str(tiny_model), max_seq_length=LONG)
    pooling = Pooling(32, pooling_mode="mean", include_prompt=False)
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu", **options)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """What the retriever was given so far: each text, and how many of its tokens are not pooled."""
    seen: Given = set()
    decode, forward = make_tokenizer().decode, Pooling.forward

    def recorded(self: Pooling, features: dict[str, Any], **options: Any) -> Any:
        left_out = 0 if self.include_prompt else int(features.get("prompt_length", 0))
        for ids, mask in zip(features["input_ids"], features["attention_mask"]):
            text = decode(ids[mask.bool()])
            if "tone " in text:  # not of the examples that the library puts into a model's card
                seen.add((text, left_out))
        return forward(self, features, **options)

    monkeypatch.setattr(Pooling, "forward", recorded)
    return seen


def of_folder(folder: Path, data: dict[str, str], given: Given) -> tuple[Given, Given]:
    """What the library gives the saved model for the queries and for the documents."""
    before, found = set(given), []
    model, both = SentenceTransformer(str(folder), device="cpu"), nullcontext()
    if not texts.library_keeps_lengths():  # before sentence-transformers 6.0
        model = load_sentence_transformer(folder, device="cpu")
        both = texts.fixed_lengths(model, None, None)
    own = load_task(data["eval_data"], EvaluationOptions())
    with both:
        for encode_kind, of_kind in (
            (model.encode_query, own.queries),
            (model.encode_document, own.corpus),
        ):
            given.clear()
            encode_kind(list(of_kind.values()))
            found.append(set(given))
    given.clear()
    given |= before
    return found[0], found[1]


def run_mteb(model: SentenceTransformer, data: dict[str, str]) -> None:
    task, own = get_task("NFCorpus"), load_task(data["eval_data"], EvaluationOptions())
    split = {
        "corpus": Dataset.from_list(
            [{"id": d, "text": text, "title": ""} for d, text in own.corpus.items()]
        ),
        "queries": Dataset.from_list([{"id": q, "text": text} for q, text in own.queries.items()]),
        "relevant_docs": own.qrels,
        "top_ranked": None,
    }
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    evaluate_mteb_task(model, "tiny", task, EvaluationOptions())


def run_trainer(model: SentenceTransformer, rows: Any, folder: Path, **options: Any) -> None:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, **options.pop("arguments", {}),
    )  # fmt: skip
    collator = DreamCollator(model, **options)
    loss = PoolInfoNCELoss(model)
    SentenceTransformerTrainer(
        model, arguments, train_dataset=rows, loss=loss, data_collator=collator
    ).train()


TRAININGS: dict[str, dict[str, Any]] = {
    "direct": {"objective": "dream", "teaching": "direct"},
    "distilled, in mini-batches": {"objective": "dream", "mini_batch_size": 3},
    "replug": {"objective": "replug"},
    "emdr": {"objective": "emdr", "lora_r": 0},
    "revela": {"objective": "revela"},
    "infonce": {"objective": "infonce"},
    "infonce, in mini-batches": {"objective": "infonce", "mini_batch_size": 3},
    "infonce, mined": {"objective": "infonce", "pool": "mined"},
    "a language model": {"objective": "infonce", "retriever_layers": 1, "query_prompt": "Ask: "},
    "other prompts": {"objective": "infonce", "query_prompt": "Ask: ", "document_prompt": "Doc: "},
    "no prompts": {"objective": "infonce", "query_prompt": "", "document_prompt": ""},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_gives_what_the_folder_gives(
    run, base: Path, tiny_model: Path, data: dict[str, str], given: Given, tmp_path: Path, name: str
) -> None:
    own = TRAININGS[name]
    retriever = tiny_model if "retriever_layers" in own else base
    values = {
        "retriever_layers": None,
        "max_steps": 2,
        "lora_r": 2,
        "save_steps": 0,
        "top_k": 2,
        **data,
        **own,
    }
    config = run(retriever=str(retriever), **LENGTHS, **values)
    train(config, heads=HeadFile(heads=[(1, 0), (2, 3)]), console=quiet())
    queries, documents = of_folder(tmp_path / "out" / "last", data, given)
    assert given == queries | documents
    # The expected texts: own prompts unless the config has others, and both lengths are reached.
    default = {} if retriever == tiny_model else PROMPTS
    for kind, found, length in (("query", queries, 22), ("document", documents, 34)):
        prompt = own.get(f"{kind}_prompt", default.get(kind, ""))
        assert all(text.startswith(prompt) for text, _ in found)
        assert {left_out for _, left_out in found} == {
            len(prompt) if retriever == base else 0,
        }
        assert max(len(make_tokenizer()(text)["input_ids"]) for text, _ in found) == length
    # The run's own figures are those that the command finds in the folder.
    of_run = read_evaluations(tmp_path / "out")[-1]
    output = tmp_path / "evaluation.json"
    dream("evaluate", of_run.model, data["eval_data"], "--no-bm25", "--output", output)
    (found,) = read_evaluations(output)
    assert found.query_ndcg_at_10 == of_run.query_ndcg_at_10
    assert {**found.settings, "step": of_run.settings["step"]} == of_run.settings


@pytest.mark.parametrize("name", ["evaluate", "mteb", "mine", "compare", "doctor", "demo", "mass"])
def test_commands_give_what_the_folder_gives(
    run, base: Path, data: dict[str, str], given: Given, tmp_path: Path, name: str
) -> None:
    config = run(
        retriever=str(base), retriever_layers=None, objective="infonce", max_steps=2, save_steps=0,
        **data, **LENGTHS,
    )  # fmt: skip
    folder = save_retriever(retriever_of(config), tmp_path / "saved")
    queries, documents = of_folder(folder, data, given)
    model = load_sentence_transformer(folder, device="cpu")
    assert not given
    if name == "evaluate":
        dream("evaluate", folder, data["eval_data"])
    elif name == "mteb":
        run_mteb(model, data)
    elif name == "mine":
        dream(
            *("mine", data["train_data"], "--output", tmp_path / "mined.jsonl"),
            *("--retriever", folder, "--batch-size", 8, "--device", "cpu"),
        )
        account = json.loads((tmp_path / "mined.provenance.json").read_text())
        assert account["prompts"] == PROMPTS and account["query_max_len"] == 22
    elif name == "compare":
        run_comparison(Comparison(config, {"a": {}}), quiet())
    elif name == "doctor":
        diagnose(config)
        assert {text for text, _ in given} <= {text for text, _ in queries | documents}
        assert given & queries and given & documents  # it looks at a batch, and takes two steps
        return
    elif name == "demo":
        task = load_task(data["eval_data"], EvaluationOptions())
        DemoEvaluator(task, task)(model)
    else:
        run_trainer(model, Dataset.from_list(make_lines()), tmp_path)
        assert given <= queries | documents and given & queries and given & documents
        return
    assert given == queries | documents


def test_the_first_figure_is_that_of_the_model_itself(run, base: Path, data, tmp_path) -> None:
    """With the lengths that it has, and its own prompts."""
    config = run(
        retriever=str(base), retriever_layers=None, objective="infonce", max_steps=1,
        query_max_len=LONG, passage_max_len=LONG, **data,
    )  # fmt: skip
    result = train(config, console=quiet())
    options = EvaluationOptions()
    found = evaluate_task(load_sentence_transformer(base), "base", data["eval_data"], options)
    first = result.history.evaluations[0]
    assert first["step"] == 0 and first["ndcg_at_10"] == found.ndcg_at_10
    assert found.settings["prompts"] == PROMPTS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompts": {"query": "Q: "}},
        {"prompts": {"passage": "P: "}},
        {"prompts": {"corpus": "C: ", "query": "Q: "}, "default_prompt_name": "corpus"},
        {"prompts": {"any": "A: "}, "default_prompt_name": "any"},
    ],
)
def test_the_library_chooses_the_prompt(
    tiny_model: Path, given: Given, tmp_path: Path, options
) -> None:
    """Regardless of the prompts' names, also if only the default one is named."""
    make_model(tiny_model, **options).save_pretrained(str(tmp_path))
    for keep in (None, "query", "document"):
        model = SentenceTransformer(str(tmp_path), device="cpu")
        if keep is not None:  # older models do not have both names
            model.prompts.pop(keep)
        for task in ("query", "document"):
            given.clear()
            getattr(model, f"encode_{task}")(["a stone here"])
            (expected,) = given
            given.clear()
            model(text_features(model, ["a stone here"], task))
            assert given == {expected}
            assert expected == (
                f"{prompt_of(model, task)}a stone here",
                len(prompt_of(model, task)),
            )


def test_a_router_takes_its_routes(tiny_model: Path, given: Given) -> None:
    """Queries and documents go to their own encoders, with lengths of their own."""
    modules = {
        task: [Transformer(str(tiny_model), max_seq_length=LONG), Pooling(32, pooling_mode=mode)]
        for task, mode in (("query", "mean"), ("document", "max"))
    }
    model = SentenceTransformer(modules=[Router(modules)], device="cpu")
    texts.set_lengths(model, 17, 22)
    both = ["A stone is here, and another there", "No stone is here"]
    for task, length in (("query", 17), ("document", 22)):
        given.clear()
        expected = encode(model, both, task, convert_to_tensor=True)
        assert given == {(both[0][:length], 0), (both[1], 0)}
        found = model(text_features(model, both, task))["sentence_embedding"]
        torch.testing.assert_close(found, expected)


COLUMNS = [
    {"query": line["query"], "target": "t", "positive": d[0], "negative": d[1], "negative_2": d[2]}
    for line in make_lines()
    for d in [line["documents"]]
]
SAME = {"query": "A: ", "positive": "B: ", "negative": "B: ", "negative_2": "B: "}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("A: ", ("A: ", "A: ")),
        (SAME, ("A: ", "B: ")),
        ({"query": "A: "}, ("A: ", "")),
        ({"first": "A: "}, ("A: ", "A: ")),
        ({"first": SAME}, ("A: ", "B: ")),
        ({"second": SAME}, ("", "")),
        ({**SAME, "positive": "C: "}, "prompts must be the same for every column of documents"),
        ({"query": "A: ", "document": "B: "}, "for columns that are embedded, query, positive, n"),
        ({"target": "A: "}, "for columns that are embedded, query, .* got target"),
        ({"only": SAME}, "prompts names data sets .only., and there is only one"),
    ],
)
def test_prompts_of_the_trainer_are_used(base, tmp_path, given: Given, prompts, expected) -> None:
    rows: Any = Dataset.from_list(COLUMNS)
    if isinstance(prompts, dict) and prompts.keys() & {"first", "second"}:
        rows = DatasetDict({"first": rows})
    model = SentenceTransformer(str(base), device="cpu")
    arguments = {"prompts": prompts}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            run_trainer(model, rows, tmp_path, arguments=arguments)
        return
    run_trainer(model, rows, tmp_path, arguments=arguments)
    found = {text for text, _ in given}
    queries = {expected[0] + row["query"] for row in COLUMNS}
    columns = ("positive", "negative", "negative_2")
    assert found == queries | {expected[1] + row[name] for row in COLUMNS for name in columns}


def test_prompts_in_two_places_are_refused(base: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(base), device="cpu")
    options = {"arguments": {"prompts": "A: "}, "prompts": PROMPTS}
    with pytest.raises(ValueError, match="to the trainer or to DreamCollator, not both"):
        run_trainer(model, Dataset.from_list(COLUMNS), tmp_path, **options)


def test_a_library_of_one_length_has_the_lengths_beside_the_model(
    run, base: Path, data, given: Given, tmp_path: Path, monkeypatch
) -> None:
    """Before 6.0, sentence-transformers has no length of queries: the commands read it here."""
    config = run(retriever=str(base), retriever_layers=None, **data, **LENGTHS)
    kept = save_retriever(retriever_of(config), tmp_path / "kept")
    monkeypatch.setattr(texts, "library_keeps_lengths", lambda: False)
    model = retriever_of(config)
    folder = save_retriever(model, tmp_path / "beside")
    file = folder / texts.LENGTHS_FILE
    assert json.loads(file.read_text()) == {"query": 22, "document": 34}
    module = folder / "sentence_bert_config.json"
    module.write_text(
        json.dumps({k: v for k, v in json.loads(module.read_text()).items() if "length" not in k})
    )
    options = EvaluationOptions()
    found = [
        evaluate_task(load_sentence_transformer(path), "m", data["eval_data"], options)
        for path in (kept, folder)
    ]
    assert found[0] == found[1] and found[0].settings["query_max_len"] == 22
    file.write_text('{"query": 0, "document": 3}')
    with pytest.raises(ValueError, match=r"text_lengths.json: query must be a number .*got 0"):
        load_sentence_transformer(folder)
    equal = config.with_changes(query_max_len=34)
    assert not (save_retriever(retriever_of(equal), folder) / texts.LENGTHS_FILE).exists()


def test_a_model_uses_its_own_similarity(base: Path) -> None:
    """A dot-product model is searched by dot products; a trained one compares by cosine."""
    model = SentenceTransformer(str(base), device="cpu", similarity_fn_name="dot")
    del model[2]  # the normalisation
    queries, corpus = {"a": "Where is it?"}, {str(i): "The stone " * i for i in range(1, 9)}
    found = search(model, RetrievalTask(queries, corpus, {}), k=8)["a"]
    query = model.encode_query(list(queries.values()), convert_to_tensor=True)
    documents = model.encode_document(list(corpus.values()), convert_to_tensor=True)
    expected = dict(zip(corpus, (query @ documents.T)[0].tolist()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(expected.values())) == 8 and max(expected.values()) > 1.5


def test_training_refuses_and_says_what_it_does_not_keep(run, base: Path) -> None:
    config = run(retriever=str(base), retriever_layers=None)
    model = SentenceTransformer(str(base), device="cpu", truncate_dim=8)
    with pytest.raises(ValueError, match="truncate_dim 8, which training does not use"):
        train(config, model=model, console=quiet())
    model = SentenceTransformer(str(base), device="cpu", similarity_fn_name="dot")
    with pytest.warns(UserWarning, match="similarity is 'dot'; it is trained with 'cosine'"):
        texts.prepare_retriever(model, config.retriever, config.lengths)
    assert model.similarity_fn_name == "cosine"
