"""Documentation as a retrieval set: parsing, names, and what may be trained on."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dream_training.demo import docstrings
from dream_training.demo.docstring_text import parse_docstring, plain_text
from dream_training.demo.docstrings import (
    DocumentationData,
    load_documentation,
    repeats_summary,
)
from dream_training.demo.public_api import PublicApi

BODY = "It is a long enough body that says in plain words what this {} does to its input data."

MakePackage = Callable[[dict[str, str]], str]


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePackage]:
    """Write a package from its files and return its import name."""
    name = "handmade_package"

    def make(files: dict[str, str]) -> str:
        for path, source in {"__init__.py": "", **files}.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(source))
        return name

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def function(name: str, summary: str, see_also: str = "") -> str:
    """Source of a function with a numpydoc docstring."""
    lines = [summary, "", BODY.format(name)]
    if see_also:
        lines += ["", "See Also", "--------", *see_also.splitlines()]
    docstring = "\n".join(f"    {line}".rstrip() for line in lines)
    return f'def {name}():\n    r"""\n{docstring}\n    """\n\n'


@pytest.fixture(scope="module")
def numpy_data() -> DocumentationData:
    return load_documentation(["numpy"], test_size=60, corpus_size=200)


# Parsing


def test_numpydoc_sections_become_plain_text() -> None:
    parsed = parse_docstring(
        r"""
        Compute the :func:`~pkg.mean` of ``a``. It is fast.

        The *extended* text [1]_ uses :math:`x^2`.

        .. versionadded:: 1.2
           Not part of the text.

        >>> mean(1)
        1

        Parameters
        ----------
        a, b : array_like
            The **first** values.
        *args : tuple

        Returns
        -------
        float
            The mean value.

        See Also
        --------
        pkg.other : Another way,
            on two lines.
        first, second

        Notes
        -----
        A note.

        References
        ----------
        .. [1] A book.

        Examples
        --------
        >>> 1 + 1
        2
        """
    )
    assert parsed is not None
    assert parsed.summary == "Compute the mean of a"
    assert parsed.description == "It is fast. The extended text uses x^2."
    assert parsed.parameters == (("a, b", "The first values."), ("*args", ""))
    assert parsed.returns == (("float", "The mean value."),)
    assert parsed.notes == "A note."
    assert [(s.names, s.description) for s in parsed.see_also] == [
        (("pkg.other",), "Another way, on two lines")
    ]
    for left_out in ("Compute", "Another way", "book", "1 + 1", "Not part"):
        assert left_out not in parsed.body


def test_torch_sections_and_signature_become_plain_text() -> None:
    parsed = parse_docstring(
        r"""
        add(input, other, *, alpha=1) -> Tensor

        Adds :attr:`other`, scaled by :attr:`alpha`, to :class:`Tensor`\ s.

        .. note:: This is kept.

        Args:
            input (Tensor): the input tensor.
            other (Tensor or Number): the tensor to add,
                or a number: it is broadcast.

        Keyword args:
            alpha (Number, optional): the factor

        Returns:
            Tensor: the sum.

        Example::

            >>> torch.add(a, 20)
        """
    )
    assert parsed is not None
    assert parsed.summary == "Adds other, scaled by alpha, to Tensors"
    assert parsed.description == "This is kept."
    assert parsed.parameters == (
        ("input", "the input tensor."),
        ("other", "the tensor to add, or a number: it is broadcast."),
        ("alpha", "the factor"),
    )
    assert parsed.returns == (("", "Tensor: the sum."),)
    assert "torch.add" not in parsed.body


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        (":func:`text <pkg.target>`", "text"),
        ("`link <https://example.org>`_", "link"),
        ("a `~pkg.Name`, ``*args`` and *x*", "a Name, *args and x"),
        ("2 * 3 * 4", "2 * 3 * 4"),
        (":class:`Tensor`\\s", "Tensors"),
    ],
)
def test_markup_is_stripped(markup: str, plain: str) -> None:
    assert plain_text(markup) == plain


def test_malformed_see_also_costs_only_itself() -> None:
    docstring = (
        "Summary line here.\n\nBody.\n\nSee Also\n--------\n!! nonsense\n\nNotes\n-----\nKept."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = parse_docstring(docstring)
    assert parsed is not None
    assert (parsed.summary, parsed.notes, parsed.see_also) == ("Summary line here", "Kept.", ())
    assert parse_docstring("f(x) -> int") is None


# Public objects and names


def test_one_document_per_object_under_its_shortest_public_name(make_package: MakePackage) -> None:
    package = make_package(
        {
            "__init__.py": "from .deep.module import shared\nfrom os import path, getcwd\n",
            "deep/__init__.py": "",
            "deep/module.py": function("shared", "Share a thing with others.")
            + function("copied", "Share a thing with others.").replace("copied does", "shared does")
            + "def _private():\n    'A private docstring.'\n",
            "_hidden.py": function("hidden", "Nobody sees this one."),
            "tests/__init__.py": function("test_it", "Test that it works."),
            "broken.py": "raise RuntimeError('no such platform')",
        }
    )
    api = PublicApi([package, "no_such_package_anywhere"])
    assert [entry.name for entry in api.objects] == [f"{package}.shared"]
    assert list(api.missing) == ["no_such_package_anywhere"]
    assert api.skipped_modules == 1


def test_an_import_is_no_public_name_of_the_importing_module(make_package: MakePackage) -> None:
    package = make_package(
        {
            "user.py": "from .deep.module import shared\n",
            "deep/__init__.py": "",
            "deep/module.py": function("shared", "Share a thing with others."),
        }
    )
    names = [entry.name for entry in PublicApi([package]).objects]
    assert names == [f"{package}.deep.module.shared"]


def test_see_also_names_are_resolved_in_the_scope_of_the_docstring(
    make_package: MakePackage,
) -> None:
    package = make_package(
        {
            "__init__.py": "from ._impl import source, sibling\n" + function("top", "At the top."),
            "_impl.py": function("source", "The source itself.")
            + function("sibling", "A sibling there.")
            + function("unexported", "Not exported here."),
            "sub.py": function("source", "Same short name, elsewhere.")
            + function("sibling", "Another sibling.")
            + "class Thing:\n    'A thing.'\n"
            + textwrap.indent(
                function("method", "A method.") + function("other", "Other."), "    "
            ),
        }
    )
    api = PublicApi([package])
    entries = {entry.name: entry for entry in api.objects}
    source, in_sub = entries[f"{package}.source"], entries[f"{package}.sub.source"]
    method = entries[f"{package}.sub.Thing.method"]

    assert api.resolve("sibling", source) == f"{package}.sibling"
    assert api.resolve("sibling", in_sub) == f"{package}.sub.sibling"
    assert api.resolve("top()", in_sub) == f"{package}.top"
    assert api.resolve("sub.sibling", source) == f"{package}.sub.sibling"
    assert api.resolve(f"~{package}.sub.sibling", source) == f"{package}.sub.sibling"
    assert api.resolve("other", method) == f"{package}.sub.Thing.other"
    assert api.resolve("Thing.other", in_sub) == f"{package}.sub.Thing.other"
    assert api.resolve("sibling", method) == f"{package}.sub.sibling"
    assert api.resolve("unexported", source) is None
    assert api.resolve("source", source) is None
    assert api.resolve("absent", source) is None


def test_abbreviated_and_foreign_names_are_resolved() -> None:
    pytest.importorskip("networkx", reason="networkx is not installed")
    api = PublicApi(["numpy", "networkx"])
    source = next(entry for entry in api.objects if entry.name == "networkx.pagerank")
    assert api.resolve("np.linalg.norm", source) == "numpy.linalg.norm"
    assert api.resolve("numpy.concatenate", source) == "numpy.concatenate"


# The data set


def test_descriptions_become_test_queries_and_their_functions_leave_training(
    make_package: MakePackage,
) -> None:
    package = make_package(
        {
            "__init__.py": function(
                "first",
                "Take the first element.",
                "second : A quite different wording.\n"
                "third, fourth : What both of them do.\n"
                "fifth : Sort all of the elements.\n"
                "sixth : Like sixth.\n"
                "seventh : \n"
                "absent : Something that nobody documents.",
            )
            + function("second", "Take the following element.", "fifth : Sort the elements now.")
            + function("third", "Combine the elements.")
            + function("fourth", "Split every element.", "fifth : Put things in order.")
            + function("fifth", "Sort all of the elements.")
            + function("sixth", "What both of them do.")
            + function("seventh", "Close the whole file.")
            + "def short():\n    'No body follows this line.'\n"
        }
    )
    data = load_documentation([package], target="name")
    relevant = {
        data.test.queries[key]: {name.rpartition(".")[2] for name in row}
        for key, row in data.test.qrels.items()
    }
    assert relevant == {
        "A quite different wording": {"second"},
        "What both of them do": {"third", "fourth"},
        "Put things in order": {"fifth"},
        "Sort the elements now": {"fifth"},
    }
    assert list(data.repeats.queries.values()) == ["Sort all of the elements"]
    # "sixth" has the text of a test query as its summary.
    assert [example.id.rpartition(".")[2] for example in data.train] == ["first", "seventh"]
    assert data.train[0].query == "Take the first element"
    assert data.train[0].document == f"{package}.first\n{BODY.format('first')}"
    assert data.train[0].target == f"{package}.first"
    assert set(data.corpus) == {f"{package}.{n}" for n in ORDINALS}
    assert data.counts["see_also_unresolved"] == 1
    assert data.counts["see_also_short"] == 1
    assert data.counts["train_with_test_query"] == 1


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")


def test_a_description_shared_by_many_functions_is_no_query(make_package: MakePackage) -> None:
    pointers = "\n".join(f"f{i} : The equivalent of this." for i in range(5))
    package = make_package(
        {
            "__init__.py": function("source", "Where all of this begins.", pointers)
            + "".join(function(f"f{i}", f"Summary of number {i}.") for i in range(5))
        }
    )
    data = load_documentation([package])
    assert not data.test.queries
    assert data.counts["descriptions_of_many"] == 1


def test_a_shared_target_is_not_trained_on(make_package: MakePackage) -> None:
    package = make_package(
        {
            "__init__.py": function("first", "Take the first element.")
            + function("second", "Take the second element.")
            + function("third", "Take the third one.").replace("third does", "second does")
        }
    )
    data = load_documentation([package], target="description")
    assert [example.id for example in data.train] == [f"{package}.first"]
    assert data.counts["train_with_shared_target"] == 2


@pytest.mark.parametrize(
    ("description", "summary", "repeat"),
    [
        ("Sort an array.", "Sort an `array`", True),
        ("sort an array", "Return a sorted copy", False),
        ("one two three four five", "one two three four", True),
        ("one two three four five", "one two three", False),
        ("one two", "one two three four five six", True),
    ],
)
def test_what_counts_as_a_repeat(description: str, summary: str, repeat: bool) -> None:
    assert repeats_summary(description, summary) is repeat


def test_splits_are_disjoint_from_training(numpy_data: DocumentationData) -> None:
    data = numpy_data
    trained_on = {example.id for example in data.train}
    assert len(data.test.queries) == 60
    assert len(data.repeats.queries) > 0
    for split in (data.test, data.repeats):
        assert split.queries.keys() == split.qrels.keys()
        relevant = {name for row in split.qrels.values() for name in row}
        assert relevant
        assert not relevant & trained_on
        assert relevant <= data.corpus.keys()
    assert not {e.query.lower() for e in data.train} & {
        query.lower() for query in data.test.queries.values()
    }


def test_documents_do_not_hold_their_query(numpy_data: DocumentationData) -> None:
    for example in numpy_data.train:
        first_line, _, body = example.document.partition("\n")
        assert first_line == example.id
        assert ">>>" not in body
    holding = sum(example.query in example.document for example in numpy_data.train)
    # A few docstrings repeat their summary in the body.
    assert holding < 0.02 * len(numpy_data.train)


def test_the_same_call_gives_the_same_data_and_another_seed_another_test(
    numpy_data: DocumentationData,
) -> None:
    again = load_documentation(["numpy"], test_size=60, corpus_size=200)
    assert again == numpy_data
    assert list(again.corpus) == list(numpy_data.corpus)
    other = load_documentation(["numpy"], test_size=60, corpus_size=200, seed=1)
    assert set(other.test.queries.values()) != set(numpy_data.test.queries.values())


def test_corpus_is_filled_with_training_documents(numpy_data: DocumentationData) -> None:
    relevant = {name for row in numpy_data.test.qrels.values() for name in row}
    trained_on = {example.id for example in numpy_data.train}
    assert len(numpy_data.corpus) == 200
    assert (numpy_data.corpus.keys() - relevant) & trained_on
    smallest = load_documentation(["numpy"], test_size=60, corpus_size=0)
    assert smallest.corpus.keys() == relevant


@pytest.mark.parametrize("target", sorted(docstrings.TARGETS))
def test_targets_are_short_parts_of_the_document(target: str) -> None:
    data = load_documentation(["numpy"], test_size=10, corpus_size=0, target=target)
    assert len(data.train) > 300
    for example in data.train:
        assert 0 < len(example.target) <= 100
        if target != "parameters":
            assert example.target in example.document


def test_absent_packages_are_skipped_and_counted(make_package: MakePackage) -> None:
    package = make_package({"__init__.py": function("first", "Take the first element.")})
    data = load_documentation(["no_such_package_anywhere", package])
    assert data.versions == {package: "unknown"}
    assert len(data.train) == 1
    assert data.counts["packages_missing"] == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="target: expected one of"):
        load_documentation(["numpy"], target="summary")
    with pytest.raises(ValueError, match="test_size"):
        load_documentation(["numpy"], test_size=-1)
    with pytest.raises(ValueError, match="none of"):
        load_documentation(["no_such_package_anywhere"])
