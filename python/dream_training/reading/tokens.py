"""The reader's texts as tokens: documents, queries and targets, each in its part of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dream_kernels.parsing import shortened, why_not_text
from dream_training.choices import check_at_least
from dream_training.models.text_tokens import text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dream_training.reading.prompts import ReaderPrompt


class PromptTokens:
    """Tokenises the texts of a prompt, one by one, and cuts them to their lengths.

    The names of special tokens in a text are read as the characters that they are written with.

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
        self.header = self._header()
        self.around_document = self._around(prompt.document, "{document}")
        self._around_query = self._around(prompt.query, "{query}")
        before, after = prompt.target.split("{target}")
        # The space before a target belongs to its first word, as tokenizers have it.
        self._target_space = before[len(before.rstrip(" ")) :]
        self._around_target = self._ids(before.rstrip(" ")), self._ids(after)
        self.no_query = [*self._around_query[0], *self._around_query[1]]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of documents.

        Raises:
            ValueError: a text is blank, is not valid Unicode, or has no token; the message names
                its index, here and in the other methods.
        """
        before, after = self.around_document
        return [
            before + self._text(text, self.passage_max_len, "documents", i) + after
            for i, text in enumerate(texts)
        ]

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of queries."""
        return [tokens for tokens, _ in self.queries_and_spans(texts)]

    def queries_and_spans(self, texts: Sequence[str]) -> list[tuple[list[int], tuple[int, int]]]:
        """Token ids of queries, and the begin and end of each query's own tokens among them."""
        before, after = self._around_query
        found = []
        for i, text in enumerate(texts):
            own = self._text(text, self.query_max_len, "queries", i)
            found.append((before + own + after, (len(before), len(before) + len(own))))
        return found

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of targets, prompt included cut to ``target_max_len``."""
        before, after = self._around_target
        limit = self.target_max_len
        return [
            (before + self._text(text, limit, "targets", i, self._target_space) + after)[:limit]
            for i, text in enumerate(texts)
        ]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _header(self) -> list[int]:
        header = self._ids(self.prompt.header)
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is None or not self.prompt.bos or header[:1] == [begin]:
            return header
        return [begin, *header]

    def _around(self, template: str, placeholder: str) -> tuple[list[int], list[int]]:
        before, after = template.split(placeholder)
        return self._ids(before), self._ids(after)

    def _text(
        self, text: str, limit: int, name: str, index: int, space: str | None = None
    ) -> list[int]:
        """Tokens of a text; with ``space`` it is stripped, and the space put before it."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must not be blank, got {shortened(text)} at {index}")
        if (reason := why_not_text(text)) is not None:
            raise ValueError(f"{name} must be texts, but in {name}[{index}] {reason}")
        own = text_tokens(self.tokenizer, text if space is None else space + text.strip(), limit)
        if not own:
            raise ValueError(f"{name} must have a token each, got {shortened(text)} at {index}")
        return own


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
