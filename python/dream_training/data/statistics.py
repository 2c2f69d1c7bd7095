"""Statistics of a data set, to look at before training on it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dream_training.data.training_row import TrainingRow, normalised

FIELDS = ("query", "target", "document")
# Places reported for each kind of suspicious line.
_PLACES = 3
# Texts per call of a tokenizer.
_BATCH = 512
_FEW_WORDS = 3

CountLengths = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Lengths:
    """A unit of length, and the limits at which texts are cut.

    Attributes:
        unit: its name.
        count: returns the length of each text.
        limits: the length that ``query``, ``target`` and ``document`` are cut to, for those that
            are cut.
        fields: which of the three are measured.
    """

    unit: str
    count: CountLengths
    limits: Mapping[str, int] = field(default_factory=dict)
    fields: tuple[str, ...] = FIELDS


def count_words(texts: Sequence[str]) -> list[int]:
    """Return the number of words of each text."""
    return [len(text.split()) for text in texts]


def token_lengths(tokenizer: Any, special_tokens: int = 0) -> CountLengths:
    """Return a function that counts a tokenizer's tokens, plus ``special_tokens`` per text."""

    def count(texts: Sequence[str]) -> list[int]:
        ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [len(tokens) + special_tokens for tokens in ids]

    return count


def describe(
    rows: Iterable[TrainingRow],
    lengths: Sequence[Lengths] = (),
    bad_lines: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe training rows in one pass over them.

    Args:
        rows: the rows.
        lengths: units in addition to words.
        bad_lines: errors of lines that could not be read; used at the end, so reading ``rows`` may
            add to them.

    Returns:
        Values for JSON:

        - ``lines``, ``with_positive``, ``with_several_positives``, ``with_target``,
          ``with_answers``: numbers of lines;
        - ``candidates``: quantiles of the number of documents in a line;
        - ``documents``: number of distinct documents;
        - ``lengths``: quantiles by unit and field, and ``cut``, the share beyond the limit; equal
          documents are measured once;
        - ``repeated_queries``, ``repeated_lines`` (query and target), ``shared_documents`` (in
          more than one line), ``repeated_candidates`` (in one line, where they count once);
        - ``target_in_positive`` and ``target_in_other``: of the lines with a known positive and a
          target, the share whose target occurs verbatim in a positive, or in another candidate;
          ``target_in_candidate``: of the lines with a target but no known positive;
        - ``query_begins_candidate``: share of lines in which a candidate begins with the query;
        - ``suspicious``: number by kind, and the first few places.

    Raises:
        ValueError: there is no row.
    """
    state = _State([Lengths("words", count_words), *lengths])
    for row in rows:
        state.add(row)
    if not state.counts["lines"]:
        problem = f"; the first fault: {bad_lines[0]}" if bad_lines else ""
        raise ValueError(f"the data has no line to describe{problem}")
    for problem in bad_lines:
        state.suspect("unreadable line", problem)
    return state.result()


class _State:
    def __init__(self, lengths: Sequence[Lengths]) -> None:
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "lines",
                "with_positive",
                "with_several_positives",
                "with_target",
                "with_answers",
                "repeated_queries",
                "repeated_lines",
                "repeated_candidates",
                "labelled_targets",
                "unlabelled_targets",
                "target_in_positive",
                "target_in_other",
                "target_in_candidate",
                "query_begins_candidate",
            ),
            0,
        )
        self.lengths = lengths
        self.measured = {(unit.unit, name): array("l") for unit in lengths for name in FIELDS}
        self.pending: dict[str, list[str]] = {name: [] for name in FIELDS}
        self.candidates = array("l")
        # Hashes, not texts: those would keep the whole data set in memory.
        self.queries: set[int] = set()
        self.pairs: set[int] = set()
        self.documents: dict[int, bool] = {}
        self.suspicious: dict[str, tuple[int, list[str]]] = {}

    def add(self, row: TrainingRow) -> None:
        counts = self.counts
        target = row.target or next(iter(row.answers), None)
        query, documents = normalised(row.query), [normalised(d) for d in row.documents]
        counts["lines"] += 1
        counts["with_positive"] += bool(row.positives)
        counts["with_several_positives"] += len(row.positives) > 1
        counts["with_target"] += target is not None
        counts["with_answers"] += bool(row.answers)
        counts["repeated_candidates"] += row.repeated
        self.candidates.append(len(documents))
        counts["repeated_queries"] += hash(query) in self.queries
        self.queries.add(hash(query))
        pair = hash((query, normalised(target or "")))
        counts["repeated_lines"] += pair in self.pairs
        self.pairs.add(pair)
        self._measure("query", row.query)
        if target is not None:
            self._measure("target", target)
            self._look_for_target(row, normalised(target), documents)
        for text, document in zip(row.documents, documents):
            key = hash(document)
            if key not in self.documents:
                self._measure("document", text)
            # True: seen in more than one line.
            self.documents[key] = key in self.documents
        counts["query_begins_candidate"] += any(d.startswith(query) for d in documents)
        self._suspect(row, query, target, documents)

    def _look_for_target(self, row: TrainingRow, target: str, documents: list[str]) -> None:
        inside = {i for i, document in enumerate(documents) if target in document}
        if not row.positives:
            self.counts["unlabelled_targets"] += 1
            self.counts["target_in_candidate"] += bool(inside)
            return
        self.counts["labelled_targets"] += 1
        self.counts["target_in_positive"] += bool(inside & set(row.positives))
        self.counts["target_in_other"] += bool(inside - set(row.positives))

    def _suspect(
        self, row: TrainingRow, query: str, target: str | None, documents: list[str]
    ) -> None:
        texts = (row.query, target or "", *row.documents)
        for kind, found in (
            ("no target", target is None),
            ("target equals query", target is not None and normalised(target) == query),
            ("candidate equals query", query in documents),
            (
                f"candidate of fewer than {_FEW_WORDS} words",
                any(len(document.split()) < _FEW_WORDS for document in documents),
            ),
            ("broken characters (U+FFFD)", any("\ufffd" in text for text in texts)),
        ):
            if found:
                self.suspect(kind, row.where)

    def suspect(self, kind: str, where: str) -> None:
        count, places = self.suspicious.get(kind, (0, []))
        self.suspicious[kind] = (count + 1, places if count >= _PLACES else [*places, where])

    def _measure(self, name: str, text: str) -> None:
        self.pending[name].append(text)
        if len(self.pending[name]) == _BATCH:
            self._flush(name)

    def _flush(self, name: str) -> None:
        texts, self.pending[name] = self.pending[name], []
        if texts:
            for unit in self.lengths:
                if name not in unit.fields:
                    continue
                self.measured[unit.unit, name].extend(unit.count(texts))

    def result(self) -> dict[str, Any]:
        for name in FIELDS:
            self._flush(name)
        counts = self.counts
        lines, labelled = counts["lines"], counts["labelled_targets"]
        numbers = (
            "lines",
            "with_positive",
            "with_several_positives",
            "with_target",
            "with_answers",
            "repeated_queries",
            "repeated_lines",
            "repeated_candidates",
        )
        return {
            **{name: counts[name] for name in numbers},
            "candidates": quantiles(self.candidates),
            "documents": len(self.documents),
            "shared_documents": sum(self.documents.values()),
            "lengths": {unit.unit: self._lengths(unit) for unit in self.lengths},
            "target_in_positive": _share(counts["target_in_positive"], labelled),
            "target_in_other": _share(counts["target_in_other"], labelled),
            "target_in_candidate": _share(
                counts["target_in_candidate"], counts["unlabelled_targets"]
            ),
            "query_begins_candidate": _share(counts["query_begins_candidate"], lines),
            "suspicious": {
                kind: {"count": count, "first": places}
                for kind, (count, places) in self.suspicious.items()
            },
        }

    def _lengths(self, unit: Lengths) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name in FIELDS:
            values = self.measured[unit.unit, name]
            if not values:
                continue
            result[name] = quantiles(values)
            if name in unit.limits:
                over = sum(value > unit.limits[name] for value in values)
                result[name] |= {"limit": unit.limits[name], "cut": _share(over, len(values))}
        return result


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Return minimum, median, 90th percentile, maximum and mean."""
    numbers = np.asarray(values)
    return {
        "min": int(numbers.min()),
        "median": float(np.median(numbers)),
        "p90": float(np.quantile(numbers, 0.9)),
        "max": int(numbers.max()),
        "mean": round(float(numbers.mean()), 2),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
