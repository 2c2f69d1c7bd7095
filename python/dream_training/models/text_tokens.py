"""Tokens of texts that anybody may have written: no control tokens, and no more than are used.

A document that contains ``<|im_end|>`` must not end the turn that it stands in: in the text of
documents, queries and targets, the names of special tokens are characters like any others. And a
text of a million tokens of which 128 are read is not tokenised to its end.
"""

from __future__ import annotations

from typing import Any

# Characters of a token that are looked at first; most have four.
_CHARACTERS = 16
# No token but those of long white space has so many.
_MOST_CHARACTERS = 256


def text_tokens(tokenizer: Any, text: str, limit: int) -> list[int]:
    """Return the first ``limit`` tokens of a text, none of them special.

    They are those of the whole text: of a beginning of it, tokens count only if as many follow, so
    that the cut is far from them.
    """
    size = _CHARACTERS * limit
    while True:
        ids = _plain_tokens(tokenizer, text[:size])
        if size >= len(text) or len(ids) >= 2 * limit:
            return ids[:limit]
        size *= 4


def _plain_tokens(tokenizer: Any, text: str) -> list[int]:
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = tokenizer(text, **options)["input_ids"]
    # Some vocabularies list special tokens among the pieces that texts are made of.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [token for token in ids if token not in special]


def cut_text(text: str, limit: int | None) -> str:
    """Return what of a text a tokenizer has to see to find its first ``limit`` tokens.

    For tokenizers that are called by others and cut afterwards. White space of more than
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

    Special tokens that neither begin, end nor pad a text are let pass: multimodal models have some
    that their language model lacks.

    Args:
        tokenizer: of transformers; of others nothing is said.
        model: a transformers model.
        what: what they are, such as ``reader``.

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
