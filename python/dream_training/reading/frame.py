"""A text tokenised together with what is around it in the prompt.

Tokens depend on what is beside them: to most tokenizers a space belongs to the word after it and a
line end may belong to the full stop before it, and SentencePiece puts a space before a text that
it takes for a beginning. So a text, its surroundings and some text of the neighbouring parts of the
prompt are tokenised as one string, of which the tokens of the part itself are kept.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from dream_training.models.text_tokens import in_text, text_tokens, tokens_of_beginning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a text that is not known.
SOME_TEXT = "x"
# Shares a token with no word, and lets no text be a beginning.
_NO_BEGINNING = "\n"


class Frame:
    """What is around a text in one part of the prompt: the part's own text, and its neighbours.

    Args:
        tokenizer: the reader's.
        before: the part's own text before the text.
        after: the part's own text after it.
        left: the end of what precedes the part.
        right: the beginning of what follows it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: str,
        after: str,
        left: str = "",
        right: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        #: Token ids of the part without a text.
        self.empty = part_tokens(tokenizer, before + after, left, right)
        # Special tokens are found in the prompt's own text and in no other. To a tokenizer they are
        # borders: only what is between two of them is tokenised with the text.
        names = _special_names(tokenizer)
        begin, end = _after_last(names, before), _before_first(names, after)
        self._lead = part_tokens(tokenizer, before[:begin], left)
        self._trail = part_tokens(tokenizer, after[end:], "", right)
        self._before, self._after = before[begin:], after[:end]
        self._left = "" if self._lead else left[_after_last(names, left) :]
        self._right = "" if self._trail else right[: _before_first(names, right)]
        border = before[:begin] or left
        if border and not self._left and not _is_beginning(tokenizer, border):
            self._left = _NO_BEGINNING
        self._after_cut = self._part(self._after, SOME_TEXT, self._right)[0]

    def tokens(self, text: str, limit: int) -> tuple[list[int], int, int]:
        """Token ids of the part, and the begin and end of the text's own tokens among them.

        A token of both the text and its surroundings is the text's own; the names of special
        tokens in the text are read as the characters that they are written with.

        Args:
            text: any text.
            limit: how many tokens of its own are kept. A longer text is cut as if it were alone.
        """
        if not self._tokenizer.is_fast:
            return self._joined_parts(text, limit)

        def of_beginning(size: int) -> tuple[list[int], int, int]:
            whole = size >= len(text)
            after, right = (self._after, self._right) if whole else ("", "")
            piece = self._before + text[:size] + after
            ids, offsets = self._part(piece, self._left, right)
            end = len(piece) - len(after)
            first = next((i for i, own in enumerate(offsets) if own[1] > len(self._before)), None)
            if first is None:
                return ids, len(ids), len(ids)
            last = next((i for i, own in enumerate(offsets) if own[0] >= end and i >= first), None)
            return ids, first, len(ids) if last is None else last

        ids, begin, end = tokens_of_beginning(of_beginning, len(text), limit)
        if end - begin > limit:
            end = begin + limit
            ids = ids[:end] + self._after_cut
        shift = len(self._lead)
        return self._lead + ids + self._trail, shift + begin, shift + end

    def _part(self, piece: str, left: str, right: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = _cut_out(self._tokenizer, piece, left, right, split_special_tokens=True)
        kept = in_text(self._tokenizer, ids)
        return [ids[i] for i in kept], [offsets[i] for i in kept]

    def _joined_parts(self, text: str, limit: int) -> tuple[list[int], int, int]:
        """The same of a tokenizer that does not say which characters a token is made of."""
        before = self._before.rstrip(" ")
        spaces = self._before[len(before) :]
        lead = self._lead + text_tokens(self._tokenizer, before, len(before))
        own = text_tokens(self._tokenizer, spaces + text, limit)
        return lead + own + self._after_cut + self._trail, len(lead), len(lead) + len(own)


def part_tokens(
    tokenizer: PreTrainedTokenizerBase, part: str, left: str = "", right: str = ""
) -> list[int]:
    """Token ids of a text of the prompt's own between two others.

    Args:
        tokenizer: the reader's.
        part: the text; the names of special tokens stand for the tokens.
        left: the end of what precedes it.
        right: the beginning of what follows it.
    """
    return _cut_out(tokenizer, part, left, right)[0] if part else []


def _cut_out(
    tokenizer: PreTrainedTokenizerBase, part: str, left: str, right: str, **options: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of ``part``, and which of its characters each is made of.

    A neighbour that shares a token with the part is left out: no token is in two parts.
    """
    options = {"add_special_tokens": False, "verbose": False, **options}
    if not tokenizer.is_fast:
        ids = tokenizer(part, **options)["input_ids"]
        return ids, [(0, 0)] * len(ids)
    # Some tokenizers do not count a token's spaces, which could be the other part's.
    lefts = (left, "") if left.rstrip(" ") == left else ("",)
    rights = (right, "") if part.rstrip(" ") == part else ("",)
    for before, after in product(dict.fromkeys(lefts), dict.fromkeys(rights)):
        encoded = tokenizer(before + part + after, return_offsets_mapping=True, **options)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        start, stop = len(before), len(before) + len(part)
        places = range(len(ids))
        first = 0 if not before else next((i for i in places if offsets[i][0] >= start), len(ids))
        last = len(ids)
        if after:
            last = next((i for i in places[first:] if offsets[i][0] >= stop), len(ids))
        apart = all(end <= start for _, end in offsets[:first])
        if apart and all(end <= stop for _, end in offsets[first:last]):
            break
    return ids[first:last], [(a - start, b - start) for a, b in offsets[first:last]]


def _special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _after_last(names: list[str], text: str) -> int:
    return max((text.rfind(name) + len(name) for name in names if name in text), default=0)


def _before_first(names: list[str], text: str) -> int:
    return min((text.find(name) for name in names if name in text), default=len(text))


def _is_beginning(tokenizer: PreTrainedTokenizerBase, border: str) -> bool:
    """Whether the text after a special token has the tokens that it has at the very beginning."""
    alone = part_tokens(tokenizer, SOME_TEXT)
    return part_tokens(tokenizer, SOME_TEXT, left=border) == alone
