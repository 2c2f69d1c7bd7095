"""Prompts cut out of templates: exact spans, no doubled special tokens, and what cannot be cut."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dream_training.config import TrainConfig
from dream_training.reading.prompts import (
    ReaderPrompt,
    chat_prompt,
    load_reader_prompt,
    template_prompt,
)
from dream_training.training.driver import train
from helpers.templates import CHATML, TAGS, merging_tokenizer, reader_with_prompt
from helpers.tiny import decoder_inputs, make_rows, make_tokenizer

DOCUMENTS = ["First document.", "Ünïcödé, the second\none", "x"]

PLAIN = """\
Documents:

{% for document in documents %}
{{ document }}

{% endfor %}
Question: {{ query }}
Answer: {{ target }}
"""
TRIMMED = """\
{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now("%S") %}\
{%- endif %}{{- 'Today: ' + date_string + '\\n' }}\
{%- for message in messages %}\
{{- '[' + message['role'] + ']\\n\\n' + message['content'] | trim + '[end]' }}{%- endfor %}"""


def test_a_template_of_the_plain_prompt_is_the_plain_prompt() -> None:
    assert template_prompt(PLAIN, make_tokenizer()) == ReaderPrompt()


def test_tags_surround_every_document() -> None:
    assert template_prompt(TAGS, make_tokenizer()) == ReaderPrompt(
        header="<bos>", document="<doc>{document}</doc>\n", query="Q {query} A", target="{target}"
    )


def test_a_chat_template_asks_and_the_target_answers() -> None:
    prompt = chat_prompt(merging_tokenizer(CHATML))
    assert prompt == ReaderPrompt(
        header="<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nDocuments:\n\n",
        document="{document}\n\n",
        query="Question: {query}<|im_end|>\n<|im_start|>assistant\n",
        target="{target}",
        bos=False,
    )


def test_a_template_that_trims_and_dates_its_messages() -> None:
    prompt = chat_prompt(merging_tokenizer(TRIMMED))
    assert prompt.header == "<bos>Today: 26 Jul 2024\n[user]\n\nDocuments:\n\n"
    assert prompt.document == "{document}\n\n"
    assert prompt.query == "Question: {query}[end][assistant]\n\n"


@pytest.mark.parametrize("context", ("joint", "independent"))
@pytest.mark.parametrize(
    "prompt, template, header, document",
    (
        ("plain", None, "<bos>Documents:\n\n", "{}\n\n"),
        ("tags", None, "<bos>", "<doc>{}</doc>\n"),
        (
            "chat",
            CHATML,
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nDocuments:\n\n",
            "{}\n\n",
        ),
        ("chat", TRIMMED, "<bos>Today: 26 Jul 2024\n[user]\n\nDocuments:\n\n", "{}\n\n"),
    ),
    ids=("plain", "tags", "chatml", "trimmed"),
)
def test_spans_are_the_documents_regardless_of_what_the_tokenizer_merges(
    tmp_path, monkeypatch, prompt, template, header, document, context
) -> None:
    (tmp_path / "tags.jinja").write_text(TAGS)
    tokenizer = merging_tokenizer(template)
    merged = tokenizer("".join(document.format(d) for d in DOCUMENTS))["input_ids"]
    alone = sum(len(tokenizer(d)["input_ids"]) for d in DOCUMENTS)
    assert len(merged) < alone + len(DOCUMENTS) * (len(document) - 2), "the tokenizer merges"
    choice = tmp_path / "tags.jinja" if prompt == "tags" else prompt
    reader = reader_with_prompt(choice, tokenizer, context=context)
    seen = decoder_inputs(reader, monkeypatch)
    prefix = reader.read(DOCUMENTS)
    decode = reader.tokenizer.decode
    if context == "joint":
        text = [decode(seen[0][0, start:end]) for start, end in prefix.spans[0].tolist()]
        assert decode(seen[0][0, : prefix.spans[0, 0, 0]]) == header
    else:
        length = int(prefix.spans[0, 0, 0])
        assert decode(seen[0][0, :length]) == header
        text = [decode(row[row != 0][length:]) for row in seen[0]]
    assert text == [document.format(d) for d in DOCUMENTS]
    assert (seen[0][0] == 1).sum() == header.count("<bos>"), "the first token must not be doubled"


def test_the_target_is_what_the_reader_predicts(tmp_path) -> None:
    (tmp_path / "plain.jinja").write_text(PLAIN)
    own, plain = reader_with_prompt(tmp_path / "plain.jinja"), reader_with_prompt("plain")
    assert own.tokens.prompt == plain.tokens.prompt
    assert own.tokens.header == plain.tokens.header
    reader = reader_with_prompt("chat", merging_tokenizer(CHATML))
    (tokens,) = reader.tokens.targets(["an answer"])
    assert merging_tokenizer().decode(tokens) == "an answer"


ASK = "{{ query }} {{ target }}"


def each(document: str) -> str:
    """A template that prints ``document`` for each one, a line each."""
    return f"{{% for d in documents %}}{document}\n{{% endfor %}}"


@pytest.mark.parametrize(
    "template, reason",
    (
        ("{{ documents | join('\n') }} " + ASK, "separate documents by what ends each"),
        (each("[{{ loop.index }}] {{ d }}") + ASK, "put the same text around every document"),
        (
            "{{ documents | length }} " + each("{{ d }}") + ASK,
            "before the first document it prints once '2 ' and once '1 '",
        ),
        (each("{{ d | upper }}") + ASK, r"text of documents\[0\] once .* left out or changed"),
        (each("{{ d | e }}") + ASK, r"text of documents\[0\] once .* left out or changed"),
        (each("{{ d[:99] }}") + ASK, r"text of documents\[0\] once .* left out or changed"),
        (each("{{ d }}{{ d }}") + ASK, r"text of documents\[0\] once .* printed 2 times"),
        (each("{{ d }}") + "{{ target }}", "text of query once .* left out"),
        (each("{{ d }}") + "{{ query }}", "text of target once .* left out"),
        ("{{ query }}" + each("{{ d }}") + "{{ target }}", r"query before documents\[1\]"),
        (each("{{ d }}") + "{{ target }} {{ query }}", "target before query"),
        (
            "{% for d in documents | reverse %}{{ d }}\n{% endfor %}" + ASK,
            r"documents\[1\] before documents\[0\]",
        ),
        (
            each("{{ d }}") + "{{ query }} {{ query | length }} {{ target }}",
            "between query and target it prints once",
        ),
        (each("{{ d }}") + "{{ question }} {{ target }}", "fails: 'question' is undefined"),
        ("a\n{% for d in %}", r"mine\.jinja:2: not a Jinja template"),
        ("{{ documents.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
        ("{{ documents.append('x') }}", "fails: .*append"),
    ),
)
def test_what_cannot_be_cut_is_refused_with_the_reason(
    tmp_path, template: str, reason: str
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(template)
    with pytest.raises(ValueError, match=reason) as error:
        load_reader_prompt(path, make_tokenizer())
    assert "mine.jinja" in str(error.value)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'plain', 'chat' or a Jinja file, .* 'chatt'"):
        load_reader_prompt("chatt", make_tokenizer())
    with pytest.raises(FileNotFoundError, match=r"no file 'gone\.jinja'"):
        TrainConfig(reader="r", train_data="d", reader_prompt="gone.jinja")
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        load_reader_prompt("chat", make_tokenizer())
    with pytest.raises(ValueError, match="chat template fails: no"):
        chat_prompt(merging_tokenizer("{{ raise_exception('no system prompt') }}"))
    with pytest.raises(
        ValueError, match="the reader's chat template must print the text of target"
    ):
        chat_prompt(merging_tokenizer("{{ messages[0]['content'] }}"))


def test_a_run_with_a_template(tiny_model, tmp_path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, make_rows(8))))
    (tmp_path / "tags.jinja").write_text(TAGS)

    def losses(prompt: str) -> list[float]:
        config = TrainConfig(
            reader=str(tiny_model), retriever=str(tiny_model), retriever_layers=1, lora_r=2,
            train_data=str(data), top_k=4, batch_size=4, max_steps=2, device="cpu",
            reader_prompt=prompt, output_dir=str(tmp_path / "out"),
        )  # fmt: skip
        steps = train(config, console=Console(file=io.StringIO()), overwrite=True).history.steps
        return [step["loss"] for step in steps]

    assert losses("plain") != losses(str(tmp_path / "tags.jinja"))
