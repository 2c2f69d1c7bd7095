"""Training rows from documents alone: a sentence asks, the next one is the target."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from dream_training.data.training_row import TrainingRow, make_row

# Ends of sentences: a point before a small letter or a digit is mostly that of an abbreviation.
_END = re.compile(r"(?<=[.!?])\s+(?=[^\sa-z0-9])|(?<=[\u3002\uff01\uff1f])\s*|\n+")
# A shorter sentence is mostly a heading, a longer one a list or a formula.
_LEAST_CHARACTERS, _MOST_CHARACTERS = 40, 300
# Besides the two that ask and answer, and a title.
_LEAST_LEFT = 2


def rows_of_sentences(documents: Iterable[tuple[str, str]], seed: int = 0) -> Iterator[TrainingRow]:
    """Yield a row for each document: a sentence of it is the query, the next one the target.

    Both are taken out of the document, which is the candidate that counts as the known positive;
    the first sentence, often a title, stays. A document without two such sentences in a row, or
    with nothing else, gives no row.

    Args:
        documents: place (for messages) and text of each.
        seed: of the choice of the sentences.

    Raises:
        ValueError: no document gives a row.
    """
    found, first = False, None
    for where, text in documents:
        first = first or where
        spans = _sentences(text)
        fitting = [
            i
            for i in range(1, len(spans) - 1)
            if len(spans) >= 2 + _LEAST_LEFT and _fits(spans[i]) and _fits(spans[i + 1])
        ]
        if not fitting:
            continue
        found = True
        # By the text, so that a document gives the same row in any collection.
        chosen = random.Random(f"{seed}:{text}").choice(fitting)
        (start, middle), (after, end) = spans[chosen], spans[chosen + 1]
        rest = text[:start] + text[end:].lstrip()
        yield make_row(text[start:middle], [rest.strip()], [0], target=text[after:end], where=where)
    if not found:
        raise ValueError(
            f"{first or 'documents'}: no document has {2 + _LEAST_LEFT} sentences, two of them in "
            f"a row of {_LEAST_CHARACTERS} to {_MOST_CHARACTERS} characters"
        )


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where sentences begin and end."""
    spans, start = [], 0
    for match in _END.finditer(text):
        if text[start : match.start()].strip():
            spans.append((start, match.start()))
        start = match.end()
    if text[start:].strip():
        spans.append((start, len(text.rstrip())))
    return spans


def _fits(span: tuple[int, int]) -> bool:
    return _LEAST_CHARACTERS <= span[1] - span[0] <= _MOST_CHARACTERS
