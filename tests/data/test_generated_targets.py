"""Targets that a model writes: which lines get one, and what the model is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.data.generated_targets import GenerationCounts, write_targets
from dream_training.data.training_row import make_row
from helpers.tiny import make_decoder, make_tokenizer

ROWS = [
    make_row("where {is} it", ["not here", "It is {query} here."], [1], where="a:1"),
    make_row("has one", ["d"], target="own", where="a:2"),
    make_row("a longer question about it", ["In a longer text that says it."], [0], where="a:3"),
    make_row("has an answer", ["d"], [0], answers=["answer"], where="a:4"),
]


def write(rows, tokenizer=None, **options):
    counts = GenerationCounts()
    options = {"max_new_tokens": 12, **options}
    model, tokenizer = make_decoder(), tokenizer or make_tokenizer()
    return list(write_targets(rows, model, tokenizer, counts, **options)), counts


class Recorder:
    """Takes the place of a model: records its prompts and answers with given texts."""

    def __init__(self, *answers: str) -> None:
        self.tokenizer, self.answers, self.prompts = make_tokenizer(), list(answers), []

    def get_input_embeddings(self):
        return make_decoder().get_input_embeddings()

    def generate(self, input_ids, attention_mask, **options):
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            assert mask.tolist() == sorted(mask.tolist()), "padding stands on the left"
            self.prompts.append(self.tokenizer.decode(ids[mask.bool()]))
            rows.append(self.tokenizer(self.answers.pop(0))["input_ids"])
        width = max(map(len, rows))
        rows = [row + [0] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def test_generation_is_greedy_and_no_line_depends_on_its_neighbours() -> None:
    together, counts = write(ROWS)
    alone, _ = write(ROWS, batch_size=1)
    assert (
        [r.target for r in together]
        == [r.target for r in alone]
        == [r.target for r in write(ROWS)[0]]
    )
    assert together[1] is ROWS[1] and together[3] is ROWS[3]
    assert (counts.kept, counts.written + counts.empty) == (2, 2)

    # The first line, token by token, without the library's generation.
    model, tokenizer = make_decoder(), make_tokenizer()
    recorder = Recorder("x")
    list(write_targets(ROWS[:1], recorder, tokenizer, GenerationCounts()))
    ids = tokenizer(recorder.prompts[0])["input_ids"]
    written = []
    for _ in range(12):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(written, skip_special_tokens=True)
    expected = next((part.strip() for part in text.splitlines() if part.strip()), "")
    assert together[0].target == expected


@pytest.mark.parametrize(
    "settings",
    (
        {"num_beams": 4, "length_penalty": 3.0, "early_stopping": True},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12, "suppress_tokens": list(range(3, 200))},
        {"forced_bos_token_id": 70, "forced_eos_token_id": 71},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "max_length": 3},
        {"num_return_sequences": 3, "do_sample": True, "return_dict_in_generate": True},
    ),
)
def test_the_models_own_generation_settings_change_no_target(settings) -> None:
    expected = [row.target for row in write(ROWS)[0]]
    model, counts = make_decoder(), GenerationCounts()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    found = write_targets(ROWS, model, make_tokenizer(), counts, max_new_tokens=12)
    assert [row.target for row in found] == expected
    assert model.generation_config is own


def test_the_model_is_shown_query_and_positive() -> None:
    recorder = Recorder(" Here.\nAnd more", "\n  There")
    counts = GenerationCounts()
    rows = list(write_targets(ROWS, recorder, recorder.tokenizer, counts, passage_max_len=20))
    assert [row.target for row in rows] == ["Here.", "own", "There", None]
    assert "It is {query} here." in recorder.prompts[0]
    assert "Question: where {is} it\n" in recorder.prompts[0]
    assert recorder.prompts[0].endswith("\nAnswer:") and "not here" not in recorder.prompts[0]
    assert "In a longer text tha\n" in recorder.prompts[1], "the passage is cut"


def test_a_chat_template_is_used() -> None:
    recorder = Recorder("yes")
    recorder.tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    (row,) = write_targets(
        ROWS[:1], recorder, recorder.tokenizer, GenerationCounts(),
        instruction="{query} | {document}",
    )  # fmt: skip
    assert row.target == "yes"
    assert recorder.prompts == ["<bos>[user] where {is} it | It is {query} here. [assistant]"]


def test_empty_answers_leave_the_line_out_and_overwrite_renews_targets() -> None:
    recorder = Recorder(" ", "new", "newer")
    counts = GenerationCounts()
    rows = list(write_targets(ROWS, recorder, recorder.tokenizer, counts, overwrite=True))
    assert [row.target for row in rows] == ["own", "new", "newer"]
    assert (counts.kept, counts.written, counts.empty) == (1, 2, 1)


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="a:9: has neither a target nor a known positive"):
        write([make_row("q", ["d"], where="a:9")])
    with pytest.raises(ValueError, match=r"instruction must contain \{query\}, got 'x \{docu"):
        write(ROWS, instruction="x {document}")


def test_the_command_writes_lines(tiny_model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "flag.jsonl", tmp_path / "train.jsonl"
    lines = [{"query": f"where is it {i}", "pos": [f"It is at {i}."]} for i in range(5)]
    source.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["data", "targets", str(source), "--output", str(output), "--reader"]
    arguments += [str(tiny_model), "--batch-size", "2", "--max-new-tokens", "8", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows and all(row["target"].strip() and row["positive"] == 0 for row in rows)
    said = " ".join(result.stdout.split())  # lines are wrapped
    assert f"{len(rows)} targets were written by {tiny_model}" in said
