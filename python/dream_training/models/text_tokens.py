"""Tokens of untrusted texts: no control tokens, and no more than are used.

A document that contains ``<|im_end|>`` must not end the turn that it is in: in the text of
documents, queries and targets, the names of special tokens are characters like any others. And a
text of a million tokens of which 128 are read is not tokenised to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Characters per token to begin with; most tokens have four.
_CHARACTERS = 16
# Only tokens of long white space have more.
_MOST_CHARACTERS = 256


def text_tokens(tokenizer: Any, text: str, limit: int) -> list[int]:
    """Return the first ``limit`` tokens of a text, none of them special.

    They are those of the whole text: the tokens of a beginning count only if as many follow them,
    so that the cut is far away.
    """

    def of_beginning(size: int) -> tuple[list[int], int, int]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids = tokenizer(text[:size], **options)["input_ids"]
        own = [ids[i] for i in in_text(tokenizer, ids)]
        return own, 0, len(own)

    return tokens_of_beginning(of_beginning, len(text), limit)[0][:limit]


def tokens_of_beginning(
    of_beginning: Callable[[int], tuple[list[int], int, int]], length: int, limit: int
) -> tuple[list[int], int, int]:
    """Tokenise as little of a text as decides its first ``limit`` tokens.

    Args:
        of_beginning: returns the tokens of so many characters of the text, and the begin and end
            of those that count among them.
        length: characters of the text.
        limit: how many tokens are used.
    """
    size = _CHARACTERS * limit
    while True:
        ids, begin, end = of_beginning(size)
        if size >= length or end - begin >= 2 * limit:
            return ids, begin, end
        size *= 4


def in_text(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return the places of the tokens that are not special.

    Some vocabularies list special tokens among the pieces that texts are made of.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [place for place, token in enumerate(ids) if token not in special]


def cut_text(text: str, limit: int | None) -> str:
    """Return the beginning of a text that a tokenizer needs to find its first ``limit`` tokens.

    For tokenizers that others call and that truncate afterwards. White space of more than
    :data:`_MOST_CHARACTERS` characters a token at the beginning may leave fewer tokens.
    """
    return text if limit is None else text[: _MOST_CHARACTERS * limit]


def without_special_tokens(tokenizer: Any, text: str) -> str:
    """Return the text without the names of special tokens, for prompts that have their own."""
    names = [name for name in tokenizer.all_special_tokens if name != tokenizer.unk_token]
    while any(name in text for name in names):  # removing one may put another together
        for name in names:
            text = text.replace(name, "")
    return text


def check_vocabulary(tokenizer: Any, model: Any, what: str) -> None:
    """Refuse a tokenizer that makes tokens which the model's embedding has no row for.

    Special tokens that neither begin, end nor pad a text are allowed: multimodal models have some
    that their language model lacks.

    Args:
        tokenizer: from transformers; others are not checked.
        model: a transformers model.
        what: their name in messages, such as ``reader``.

    Raises:
        ValueError: there are such tokens; the message names one.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    added = tokenizer.added_tokens_decoder
    if rows is None or max(len(tokenizer), *added, 0) < rows:
        return
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in _USED}
    beyond = {
        number: token
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (number in used or number not in added or not added[number].special)
    }
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"{what} {model.config._name_or_path}: its tokenizer has {len(beyond)} tokens beyond "
            f"the {rows} rows of its embedding, such as {beyond[first]!r} ({first}): take the "
            f"model's own tokenizer, or save it after resize_token_embeddings({max(beyond) + 1})"
        )


_USED = ("bos", "eos", "pad", "cls", "sep", "unk")
