"""Training rows from plain text: the beginning of a passage is the query, the rest the target."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_training.choices import check_at_least
from dream_training.data.training_row import TrainingRow, make_row, normalised

SUFFIXES = (".txt", ".md")

# A word, or a character of a script that puts no spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"')\]\u201d\u2019]*$")
# Any; to count the tokens of others after it.
_A_WORD = "the"


@dataclass(frozen=True)
class TextLengths:
    """How text is cut, in words, or in the tokens of a tokenizer.

    Attributes:
        passage: of a candidate document.
        query: of the beginning that is the query.
        target: of the continuation that is the target.
        count: returns the length of each word; None counts words. A tokenizer's tokens are counted
            word by word, which is exact for tokenizers that split at spaces.
    """

    passage: int = 90
    query: int = 16
    target: int = 32
    count: Callable[[Sequence[str]], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for name in ("passage", "query", "target"):
            check_at_least(name, getattr(self, name), 1)


def fits(row: Mapping[str, Any]) -> bool:
    """Whether a row is text alone."""
    return "text" in row and not {"query", "anchor", "documents"} & row.keys()


def text_files(folder: Path) -> list[Path]:
    """Return the text files of a folder and its subfolders, in the order of their paths."""
    return sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def read_files(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield path and content of each file.

    Raises:
        ValueError: a file is not UTF-8.
    """
    for path in files:
        yield str(path), _read_file(path)


def count_tokens(tokenizer: Any) -> Callable[[Sequence[str]], Sequence[int]]:
    """Return the ``count`` of :class:`TextLengths` for a transformers tokenizer."""

    def count(words: Sequence[str]) -> Sequence[int]:
        if not words:
            return []
        # After another word: at the beginning of a text, some tokenizers put one more space.
        texts = [_A_WORD, *(f"{_A_WORD} {word}" for word in words)]
        first, *ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [len(tokens) - len(first) for tokens in ids]

    return count


def rows_of_text(
    texts: Iterable[tuple[str, str]], lengths: TextLengths | None = None
) -> Iterator[TrainingRow]:
    """Yield training rows made from plain texts.

    Every text is cut into pieces that are alternately a *document* and a *question*::

        | document 0 | query 1 target 1 | document 2 | query 3 target 3 | document 4 | ...

    The beginning of a question is the query, the rest its target, and the documents before and
    after it are the candidates; the one before counts as the known positive. So what the reader
    predicts is between the two passages that may help, and in neither of them: text is either a
    question or a document, never both, and no candidate of any row, in any batch, is a passage
    that a target was taken from. Because texts repeat themselves and each other, a question whose
    text was seen before is left out, and a document that was a question before, or in which the
    row's own target occurs verbatim, is not a candidate.

    Pieces end with a sentence if one ends in their last third.

    Args:
        texts: place (for messages) and content of each text.
        lengths: of the pieces.

    Raises:
        ValueError: no text is long enough for a document and a question after it.
    """
    lengths = lengths or TextLengths()
    seen: dict[bytes, bool] = {}
    found, first = False, None
    for where, text in texts:
        first = first or where
        pieces = _pieces(text, lengths)
        # Digests save memory: those of all texts of a source are kept.
        for piece in pieces[::2]:
            seen.setdefault(_digest(piece), False)
        for place in range(1, len(pieces), 2):
            question = pieces[place]
            split = _split(question, lengths)
            if split is None or _digest(question) in seen:
                continue
            seen[_digest(question)] = True
            query, target = split
            leak = normalised(target)
            documents = [
                piece
                for piece in (pieces[place - 1], *pieces[place + 1 : place + 2])
                if not seen[_digest(piece)] and leak not in normalised(piece)
            ]
            if documents:
                found = True
                yield make_row(query, documents, [0], target=target, where=where)
    if not found:
        raise ValueError(
            f"{first or 'texts'}: no text is long enough for a passage of {lengths.passage} and a "
            f"question of {lengths.query + lengths.target} after it"
        )


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error


def _pieces(text: str, lengths: TextLengths) -> list[str]:
    """Cut into documents and questions alternately; a last piece that is too short is left out."""
    cutter = _Cutter(text, lengths.count)
    pieces: list[str] = []
    while not cutter.done:
        question = len(pieces) % 2 == 1
        size = lengths.query + lengths.target if question else lengths.passage
        piece, length = cutter.take(size)
        least = lengths.query + lengths.target // 2 if question else lengths.query
        if length < min(least, size):
            break
        pieces.append(piece)
    return pieces


def _split(question: str, lengths: TextLengths) -> tuple[str, str] | None:
    """Split a question into query and target; None if nothing is left for the target."""
    cutter = _Cutter(question, lengths.count)
    query, _ = cutter.take(lengths.query)
    target = cutter.rest()
    return (query, target) if target else None


class _Cutter:
    """Takes pieces off the beginning of a text, with the spaces inside them as they are."""

    def __init__(
        self, text: str, count: Callable[[Sequence[str]], Sequence[int]] | None = None
    ) -> None:
        self.text = text
        self.spans = [match.span() for match in _WORD.finditer(text)]
        words = [text[start:end] for start, end in self.spans]
        self.costs = [1] * len(words) if count is None else count(words)
        self.ends = [bool(_SENTENCE_END.search(word)) for word in words]
        self.next = 0

    @property
    def done(self) -> bool:
        return self.next == len(self.spans)

    def take(self, size: int) -> tuple[str, int]:
        """Return the next words, up to ``size`` long but at least one, and their length."""
        first, length, stop = self.next, 0, self.next
        best = None
        while stop < len(self.spans) and (stop == first or length + self.costs[stop] <= size):
            length += self.costs[stop]
            stop += 1
            if self.ends[stop - 1] and length > size * 2 // 3:
                best = (stop, length)
        if best is not None:
            stop, length = best
        self.next = stop
        return self.text[self.spans[first][0] : self.spans[stop - 1][1]], length

    def rest(self) -> str:
        """Return the rest of the text."""
        if self.done:
            return ""
        return self.text[self.spans[self.next][0] : self.spans[-1][1]]


def _digest(piece: str) -> bytes:
    return hashlib.blake2b(normalised(piece).encode(), digest_size=16).digest()
