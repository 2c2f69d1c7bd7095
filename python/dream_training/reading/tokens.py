"""The reader's texts as tokens: documents, queries and targets, each in its part of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dream_kernels.parsing import shortened, why_not_text
from dream_training.choices import check_at_least
from dream_training.reading.frame import SOME_TEXT, Frame, part_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dream_training.reading.prompts import ReaderPrompt


class PromptTokens:
    """Tokenises the texts of a prompt, one by one, and cuts them to their lengths.

    The tokens are those of the whole prompt as one text, unless the tokenizer would merge two parts
    of it across their border: header, documents, query and target share no token. The names of
    special tokens in a text are read as the characters that they are written with.

    Args:
        tokenizer: the reader's.
        prompt: what is around the texts.
        query_max_len: tokens of a query; longer ones are cut.
        passage_max_len: tokens of a document.
        target_max_len: tokens of a target.

    Attributes:
        header: token ids before the documents, with at most one beginning-of-sequence token.
        no_query: token ids of the prompt's own text around a query.

    Raises:
        ValueError: a length is below 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: ReaderPrompt,
        query_max_len: int,
        passage_max_len: int,
        target_max_len: int,
    ) -> None:
        check_at_least("query_max_len", query_max_len, 1)
        check_at_least("passage_max_len", passage_max_len, 1)
        check_at_least("target_max_len", target_max_len, 1)
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.query_max_len = query_max_len
        self.passage_max_len = passage_max_len
        self.target_max_len = target_max_len
        header, documents, queries, targets = _with_spaces_ahead(prompt)
        self.header = self._header(header, documents[0] + SOME_TEXT)
        # A document is after another one or the first: its tokens are the same.
        end = SOME_TEXT + documents[1] if documents[1] else header
        self._documents = Frame(tokenizer, *documents, end, documents[0] + SOME_TEXT)
        end = SOME_TEXT + documents[1]
        self._queries = Frame(tokenizer, *queries, end, targets[0] + SOME_TEXT)
        self._targets = Frame(tokenizer, *targets, SOME_TEXT + queries[1])
        self.no_query = self._queries.empty

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of documents.

        Raises:
            ValueError: a text is blank, is not valid Unicode, or has no token; the message names
                its index, here and in the other methods.
        """
        return [
            self._text(self._documents, text, self.passage_max_len, "documents", i)[0]
            for i, text in enumerate(texts)
        ]

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of queries."""
        return [tokens for tokens, _ in self.queries_and_spans(texts)]

    def queries_of(self, texts: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
        """Token ids of queries before their targets.

        A query that is its own target would be copied whatever the documents say: in its place is
        the prompt's own text.
        """
        pairs = zip(texts, targets, self.queries(texts), strict=True)
        return [self.no_query if query == target else ids for query, target, ids in pairs]

    def queries_and_spans(self, texts: Sequence[str]) -> list[tuple[list[int], tuple[int, int]]]:
        """Token ids of queries, and the begin and end of each query's own tokens among them."""
        found = []
        for i, text in enumerate(texts):
            ids, begin, end = self._text(self._queries, text, self.query_max_len, "queries", i)
            found.append((ids, (begin, end)))
        return found

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of targets, prompt included cut to ``target_max_len``."""
        limit = self.target_max_len
        return [
            self._text(self._targets, text, limit, "targets", i, strip=True)[0][:limit]
            for i, text in enumerate(texts)
        ]

    def _header(self, header: str, right: str) -> list[int]:
        ids = part_tokens(self.tokenizer, header, right=right)
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is None or not self.prompt.bos or ids[:1] == [begin]:
            return ids
        return [begin, *ids]

    def _text(
        self, frame: Frame, text: str, limit: int, name: str, index: int, strip: bool = False
    ) -> tuple[list[int], int, int]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must not be blank, got {shortened(text)} at {index}")
        if (reason := why_not_text(text)) is not None:
            raise ValueError(f"{name} must be texts, but in {name}[{index}] {reason}")
        ids, begin, end = frame.tokens(text.strip() if strip else text, limit)
        if begin == end:
            raise ValueError(f"{name} must have a token each, got {shortened(text)} at {index}")
        return ids, begin, end


_Around = tuple[str, str]


def _with_spaces_ahead(prompt: ReaderPrompt) -> tuple[str, _Around, _Around, _Around]:
    """Header, and what is around document, query and target; spaces between are the later one's."""
    header = prompt.header
    begin, end = prompt.document.split("{document}")
    query, ask = prompt.query.split("{query}")
    answer, last = prompt.target.split("{target}")
    # A document is after the header or another document, a query after a document.
    count = min(_spaces(header), _spaces(end))
    begin, query = " " * count + begin, " " * count + query
    answer = " " * _spaces(ask) + answer
    ask = ask[: len(ask) - _spaces(ask)]
    header, end = header[: len(header) - count], end[: len(end) - count]
    return header, (begin, end), (query, ask), (answer, last)


def _spaces(text: str) -> int:
    """How many spaces a text ends with."""
    return len(text) - len(text.rstrip(" "))


def pad(sequences: Sequence[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[B, L]`` int64 of sequences, padded on the ``side`` that is named."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), None)
        ids[b, place] = torch.tensor(sequence)
        mask[b, place] = 1
    return ids.to(device), mask.to(device)
