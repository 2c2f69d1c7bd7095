"""The documentation of installed scientific packages as a retrieval data set.

A *document* is what a docstring says of a function, class or method after its summary line. The
summary line is the *query* of a training example. The *test queries* are written by other people:
they are the descriptions that the See Also section of one docstring gives of another function, and
the function they point to is the relevant document.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dream_training.console import progress, tracked
from dream_training.demo.docstring_text import ParsedDocstring, first_sentence, parse_docstring
from dream_training.demo.public_api import PublicApi, PublicObject

DEFAULT_PACKAGES = ("numpy", "scipy", "sklearn", "networkx", "torch")

REPEAT_OVERLAP = 0.8
MIN_QUERY_WORDS = 3
MIN_BODY_WORDS = 10
# A description of more functions than this ("equivalent function") identifies none of them.
MAX_RELEVANT = 4
# About 24 tokens of a current tokenizer; formulas make more tokens than their words suggest.
MAX_TARGET_CHARACTERS = 80


@dataclass(frozen=True)
class TrainExample:
    """One training example: the reader predicts ``target`` from ``document`` and ``query``.

    Attributes:
        id: qualified name of the documented object.
        query: its summary line, without markup and final period.
        document: qualified name and body of its docstring.
        target: a short text that the document determines.
    """

    id: str
    query: str
    document: str
    target: str


@dataclass(frozen=True)
class RetrievalSplit:
    """Queries and their relevant documents.

    Attributes:
        queries: text by query id.
        qrels: relevance (1) by query id and document id.
    """

    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class DocumentationData:
    """What ``load_documentation`` returns.

    Attributes:
        train: training examples, ordered by id. None is about a function that is relevant in
            ``test`` or ``repeats``, and none has the text of one of their queries as its query.
        corpus: document text by qualified name; shared by both splits.
        test: See Also descriptions in other words than the summary of the function they describe.
        repeats: See Also descriptions that repeat that summary, to be reported separately.
        counts: how many objects and descriptions were found, used, and left out for which reason.
        versions: version of each package that was read; a missing package is absent.
    """

    train: list[TrainExample]
    corpus: dict[str, str]
    test: RetrievalSplit
    repeats: RetrievalSplit
    counts: dict[str, int]
    versions: dict[str, str]


@dataclass(frozen=True)
class _Documented:
    """A public object whose docstring has a summary and a body."""

    source: PublicObject
    parsed: ParsedDocstring

    @property
    def document(self) -> str:
        return f"{self.source.name}\n{self.parsed.body}"


@dataclass(frozen=True)
class _Description:
    """A See Also description, merged from all docstrings that have the same words."""

    text: str
    relevant: tuple[str, ...]
    is_repeat: bool


def _name_target(entry: _Documented) -> str:
    return entry.source.name


def _returns_target(entry: _Documented) -> str:
    for name, text in entry.parsed.returns:
        if text or name:
            return _shorten(text or name)
    return ""


def _parameters_target(entry: _Documented) -> str:
    return _shorten(", ".join(name for name, _ in entry.parsed.parameters))


def _description_target(entry: _Documented) -> str:
    return _shorten(entry.parsed.description)


TARGETS: dict[str, Callable[[_Documented], str]] = {
    "name": _name_target,
    "returns": _returns_target,
    "parameters": _parameters_target,
    "description": _description_target,
}


def load_documentation(
    packages: Iterable[str] = DEFAULT_PACKAGES,
    *,
    seed: int = 0,
    corpus_size: int = 1100,
    test_size: int = 500,
    target: str = "description",
) -> DocumentationData:
    """Read the docstrings of installed packages as training examples and a test set.

    The same package versions, arguments and seed give the same data, in the same order. A package
    that is absent is skipped: it is missing in ``versions``, and counted.

    The test takes ``test_size`` of the usable See Also descriptions. The functions they describe
    are removed from the training set, and occur as documents of the test corpus only.
    The corpus is filled up to ``corpus_size`` with other documents. These *may be documents of
    training examples*: a retriever that favours what it was trained on is then penalised.

    A description is left out if it has fewer than three words besides the names of the functions
    it points to, if it describes more than four functions, or if it points to no document. It is
    a repeat if at least 0.8 of its distinct words occur in the summary of a function it describes.

    Args:
        packages: import names of the packages.
        seed: of the choice of test queries and of the other documents in the corpus.
        corpus_size: number of documents in the corpus; larger if the relevant documents alone are
            more, smaller if the packages have fewer.
        test_size: number of queries in ``test``, or fewer if there are fewer.
        target: what the reader predicts: ``"description"``, the first sentence after the summary;
            ``"name"``, the qualified name; ``"returns"``, the description of the first returned
            value; ``"parameters"``, the parameters' names. All but the name are cut to 80
            characters. An object without that part, or that shares its text with another object,
            gives no training example: the document would not determine the target. The default is
            the one whose loss separates the right document best from wrong ones, similar ones
            included; the name gives the most examples.

    Raises:
        ValueError: for an unknown target, a negative size, or when no package could be imported.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {sorted(TARGETS)}, got {target!r}")
    for name, size in (("corpus_size", corpus_size), ("test_size", test_size)):
        if size < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {size}")
    packages = list(dict.fromkeys(packages))
    with progress("importing the packages"):
        api = PublicApi(packages)
    if len(api.missing) == len(packages):
        raise ValueError(f"packages: none of {packages} could be imported: {api.missing}")

    counts: Counter[str] = Counter(
        packages_missing=len(api.missing),
        modules_skipped=api.skipped_modules,
        objects=len(api.objects),
    )
    shown = tracked(api.objects, "reading docstrings", len(api.objects))
    parsed = [(source, parse_docstring(source.docstring)) for source in shown]
    counts["docstrings_unreadable"] = sum(text is None for _, text in parsed)
    entries = {
        source.name: _Documented(source, text)
        for source, text in parsed
        if text is not None and _words(text.body) >= MIN_BODY_WORDS
    }
    counts["documents"] = len(entries)

    mentions = [
        (name, item.description, source)
        for source, text in parsed
        if text is not None
        for item in text.see_also
        for name in item.names
    ]
    descriptions = _descriptions(mentions, api, entries, counts)
    generator = random.Random(seed)
    generator.shuffle(descriptions)
    test = [d for d in descriptions if not d.is_repeat][:test_size]
    relevant = {name for d in test for name in d.relevant}
    repeats = [d for d in descriptions if d.is_repeat and relevant.issuperset(d.relevant)]

    others = sorted(entries.keys() - relevant)
    generator.shuffle(others)
    chosen = relevant.union(others[: max(0, corpus_size - len(relevant))])
    train = _train_examples(entries, relevant, [*test, *repeats], target, counts)
    counts.update(train=len(train), test=len(test), repeats=len(repeats), corpus=len(chosen))
    return DocumentationData(
        train=train,
        corpus={name: entries[name].document for name in sorted(chosen)},
        test=_split(test, "test"),
        repeats=_split(repeats, "repeat"),
        counts=dict(counts),
        versions={name: _version(name) for name in packages if name not in api.missing},
    )


def repeats_summary(description: str, summary: str) -> bool:
    """Whether a description says nothing, or nearly nothing, that the summary does not say.

    True if at least 0.8 of the distinct words of ``description``, in lower case and without
    punctuation, are words of ``summary``.
    """
    words = set(_tokens(description))
    return len(words & set(_tokens(summary))) >= REPEAT_OVERLAP * len(words)


def _descriptions(
    mentions: Iterable[tuple[str, str, PublicObject]],
    api: PublicApi,
    entries: dict[str, _Documented],
    counts: Counter[str],
) -> list[_Description]:
    """Resolve the mentions, join equal descriptions, drop the unusable ones; sorted by text."""
    texts: dict[str, str] = {}
    relevant: dict[str, set[str]] = {}
    for written, text, source in mentions:
        counts["see_also"] += 1
        name = api.resolve(written, source)
        if name is None or name not in entries:
            counts["see_also_unresolved" if name is None else "see_also_without_document"] += 1
            continue
        if _words_besides_name(text, name) < MIN_QUERY_WORDS:
            counts["see_also_short"] += 1
            continue
        key = " ".join(_tokens(text))
        texts.setdefault(key, text)
        relevant.setdefault(key, set()).add(name)

    descriptions = []
    for key in sorted(texts):
        names = tuple(sorted(relevant[key]))
        if len(names) > MAX_RELEVANT:
            counts["descriptions_of_many"] += 1
            continue
        is_repeat = any(repeats_summary(texts[key], entries[n].parsed.summary) for n in names)
        counts["descriptions_repeating" if is_repeat else "descriptions_own_words"] += 1
        descriptions.append(_Description(texts[key], names, is_repeat))
    return descriptions


def _train_examples(
    entries: dict[str, _Documented],
    held_out: set[str],
    evaluated: Iterable[_Description],
    target: str,
    counts: Counter[str],
) -> list[TrainExample]:
    test_texts = {" ".join(_tokens(description.text)) for description in evaluated}
    targets = {name: TARGETS[target](entry) for name, entry in entries.items()}
    occurrences = Counter(targets.values())
    examples = []
    for name, entry in entries.items():
        if name in held_out:
            continue
        summary = entry.parsed.summary
        if _words(summary) < MIN_QUERY_WORDS or not targets[name]:
            counts["train_without_query_or_target"] += 1
        elif occurrences[targets[name]] > 1:
            counts["train_with_shared_target"] += 1
        elif " ".join(_tokens(summary)) in test_texts:
            counts["train_with_test_query"] += 1
        else:
            examples.append(TrainExample(name, summary, entry.document, targets[name]))
    return examples


def _split(descriptions: Iterable[_Description], prefix: str) -> RetrievalSplit:
    queries, qrels = {}, {}
    for number, description in enumerate(descriptions):
        key = f"{prefix}-{number:04d}"
        queries[key] = description.text
        qrels[key] = dict.fromkeys(description.relevant, 1)
    return RetrievalSplit(queries, qrels)


def _words_besides_name(text: str, name: str) -> int:
    """Words of ``text`` that are not the function's own name, qualified or not."""
    own = name.lower().split(".")[-1]
    words = re.findall(r"[\w.]+", text.lower())
    return sum(word.strip(".").split(".")[-1] != own for word in words if word.strip("."))


def _shorten(text: str) -> str:
    """The first sentence, cut between words if it is long."""
    sentence = textwrap.shorten(first_sentence(text)[0], MAX_TARGET_CHARACTERS, placeholder="")
    return sentence.rstrip(",;:")


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _words(text: str) -> int:
    return len(text.split())


def _version(package: str) -> str:
    """Version of the distribution that provides an import name."""
    names = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(names[0]) if names else "unknown"
