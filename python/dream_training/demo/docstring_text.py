"""Docstrings as plain text: the numpydoc form, the ``Args:`` form of torch, and their markup."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass

from numpydoc.docscrape import NumpyDocString

# What a reader of the reference manual would call the body. Summary, See Also, References and
# Examples are left out: the first two are queries, the others hold code and citations.
_NUMPYDOC_LISTS = ("Parameters", "Other Parameters", "Attributes")
_NUMPYDOC_RESULTS = ("Returns", "Yields")

_GOOGLE_HEADER = re.compile(
    r"(Args|Arguments|Parameters|Keyword args|Keyword arguments|Keyword Args|Keyword Arguments"
    r"|Returns?|Yields|Raises|Shape|Inputs?|Outputs?|Attributes|Notes?|Warnings?|References?"
    r"|Examples?|See Also):{1,2}"
)
_GOOGLE_LISTS = ("args", "arguments", "parameters", "keyword args", "keyword arguments")
_GOOGLE_RESULTS = ("return", "returns", "yields")
_GOOGLE_KEPT = ("attributes", "input", "inputs", "output", "outputs", "shape", "note", "notes")
_GOOGLE_ITEM = re.compile(r"(?P<name>\*{0,2}\w[\w, *]*?)\s*(?P<type>\([^:]*\))?\s*:(\s|$)")

_SIGNATURE = re.compile(r"([\w., ]+=)?\s*[\w.]+\(.*\)\s*(->.*)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`:(\[])")

_DIRECTIVE = re.compile(r"\.\. +([\w:-]+)::(.*)")
# Directives whose content is prose of the documentation; the content of all others is dropped.
_PROSE_DIRECTIVES = ("note", "warning", "important", "tip", "hint", "caution", "attention")

# The sentence that scikit-learn puts below nearly every summary.
_READ_MORE = re.compile(r"Read more in the [\w ]+\.\s*")


@dataclass(frozen=True)
class SeeAlso:
    """One entry of a See Also section: the names as written, and their description."""

    names: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class ParsedDocstring:
    """A docstring in plain text.

    Attributes:
        summary: the first sentence, without its final period.
        description: what follows the summary, up to the first section.
        parameters: name and description of each parameter, in order.
        returns: name or type, and description, of each returned value.
        notes: the Notes section and, in torch's form, shapes and attributes.
        see_also: entries that carry a description.
    """

    summary: str
    description: str
    parameters: tuple[tuple[str, str], ...]
    returns: tuple[tuple[str, str], ...]
    notes: str
    see_also: tuple[SeeAlso, ...]

    @property
    def body(self) -> str:
        """Everything but the summary and the See Also section, one paragraph per part."""
        parts = [self.description]
        parts += [_item(name, text) for name, text in self.parameters]
        parts += ["Returns " + _item(name, text) for name, text in self.returns]
        parts.append(self.notes)
        return "\n".join(part for part in parts if part)


def parse_docstring(docstring: str) -> ParsedDocstring | None:
    """Split a docstring into plain-text parts.

    numpydoc's underlined sections are parsed with ``numpydoc``; sections such as ``Args:`` by their
    header and indentation. A malformed See Also section alone is dropped.

    Args:
        docstring: as in ``__doc__``; indentation does not matter.

    Returns:
        The parts, or None when there is no summary or no way to read the sections.
    """
    text = _drop_signatures(inspect.cleandoc(docstring))
    if not text:
        return None
    if not re.search(r"^[ ]*[-=]{3,}[ ]*$", text, re.MULTILINE):
        return _parse_google(text)
    for candidate in (text, _drop_see_also(text)):
        try:
            # numpydoc warns of every unknown section and malformed underline; they are harmless.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sections = NumpyDocString(candidate)
        except Exception:
            # numpydoc raises more than its own error on text that is not numpydoc.
            continue
        return _from_numpydoc(sections)
    return None


def plain_text(text: str) -> str:
    """Strip reStructuredText markup, doctests and non-prose directives; join the lines.

    Roles and links keep the text a reader of the rendered page sees (``:func:`~a.b``` gives ``b``),
    mathematics keeps its source, emphasis and literals lose their marks.
    """
    return " ".join(_inline(" ".join(_prose_lines(text.splitlines()))).split())


def _plain_lines(lines: list[str]) -> str:
    return plain_text("\n".join(lines))


def first_sentence(text: str) -> tuple[str, str]:
    """Split ``text`` after its first sentence; the sentence loses its final period."""
    first, *rest = _SENTENCE_END.split(text, maxsplit=1)
    return first.strip().rstrip(".").rstrip(), "".join(rest).strip()


def _from_numpydoc(sections: NumpyDocString) -> ParsedDocstring | None:
    summary, rest = first_sentence(_plain_lines(sections["Summary"]))
    if not summary:
        return None
    see_also = tuple(
        SeeAlso(tuple(name for name, _ in functions), description)
        for functions, lines in sections["See Also"]
        if (description := _plain_lines(lines).rstrip(".").rstrip())
    )
    return ParsedDocstring(
        summary=summary,
        description=_READ_MORE.sub("", _join(rest, _plain_lines(sections["Extended Summary"]))),
        parameters=tuple(
            # Some packages write "G: graph", which numpydoc takes for a name.
            (entry.name.replace("\\", "").partition(":")[0], _plain_lines(entry.desc))
            for key in _NUMPYDOC_LISTS
            for entry in sections[key]
        ),
        returns=tuple(
            (plain_text(entry.name or entry.type), _plain_lines(entry.desc))
            for key in _NUMPYDOC_RESULTS
            for entry in sections[key]
        ),
        notes=_join(_plain_lines(sections["Warnings"]), _plain_lines(sections["Notes"])),
        see_also=see_also,
    )


def _parse_google(text: str) -> ParsedDocstring | None:
    sections = _google_sections(text.splitlines())
    paragraphs = re.split(r"\n\s*\n", "\n".join(sections.pop(0)[1]).strip(), maxsplit=1)
    summary, rest = first_sentence(plain_text(paragraphs[0]))
    if not summary:
        return None
    parameters: list[tuple[str, str]] = []
    returns: list[tuple[str, str]] = []
    notes: list[str] = []
    for header, lines in sections:
        if header in _GOOGLE_LISTS:
            parameters += _google_items(lines)
        elif header in _GOOGLE_RESULTS:
            returns.append(("", _plain_lines(lines)))
        elif header in _GOOGLE_KEPT:
            notes.append(_plain_lines(lines))
    return ParsedDocstring(
        summary=summary,
        description=_join(rest, *(plain_text(paragraph) for paragraph in paragraphs[1:])),
        parameters=tuple(parameters),
        returns=tuple(item for item in returns if item[1]),
        notes=_join(*notes),
        see_also=(),
    )


def _google_sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Split at the headers at the margin; the first part has the header ``""``."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if _GOOGLE_HEADER.fullmatch(line.rstrip()):
            sections.append((line.strip().rstrip(":").lower(), []))
        else:
            sections[-1][1].append(line)
    return sections


def _google_items(lines: list[str]) -> list[tuple[str, str]]:
    """``name (type): description`` entries; lines that are indented deeper continue an entry."""
    items: list[tuple[str, list[str]]] = []
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        match = _GOOGLE_ITEM.match(line[indent:])
        if match and not line[:indent].strip():
            items.append((match["name"], [line[indent + match.end() :]]))
        elif items:
            items[-1][1].append(line)
    return [(name, _plain_lines(text)) for name, text in items]


def _drop_signatures(text: str) -> str:
    """Remove the signatures that functions written in C put before the summary."""
    while True:
        paragraph, _, rest = text.partition("\n\n")
        if not _SIGNATURE.fullmatch(" ".join(paragraph.split())):
            return text
        text = rest.lstrip("\n")


def _drop_see_also(text: str) -> str:
    lines = text.splitlines()
    kept: list[str] = []
    inside = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following.strip() and set(following.strip()) <= {"-", "="}:
            inside = line.strip().lower() == "see also"
        if not inside:
            kept.append(line)
    return "\n".join(kept)


def _prose_lines(lines: list[str]) -> list[str]:
    """Drop directives that are not prose, comments, doctests and their output."""
    kept: list[str] = []
    dropped_indent: int | None = None
    in_doctest = False
    for line in lines:
        content = line.strip()
        indent = len(line) - len(line.lstrip())
        if not content:
            in_doctest = False
            continue
        if dropped_indent is not None:
            if indent > dropped_indent:
                continue
            dropped_indent = None
        in_doctest = in_doctest or content.lstrip("# ").startswith(">>>")
        if in_doctest:
            continue
        directive = _DIRECTIVE.match(content)
        if directive and directive[1].lower() in _PROSE_DIRECTIVES:
            kept.append(directive[2].strip())
        elif directive or content.startswith(".. "):
            dropped_indent = indent
        else:
            kept.append(content)
    return kept


def _inline(text: str) -> str:
    # An escaped space, or a bare escape that ends a role before a suffix, shows as nothing.
    text = re.sub(r"`\\ ?|\\ ", lambda match: "`" if match[0][0] == "`" else "", text)
    # :role:`text <target>`, :role:`~module.name`, :role:`text`
    text = re.sub(r":[\w:+-]+:`([^`<]+?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]+)`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}", r"\1", text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`~(?:[^`]*\.)?([^`.]+)`", r"\1", text)
    text = re.sub(r"`([^`]*)`_{0,2}", r"\1", text)
    text = re.sub(r"\s*\[[#\w]+\]_", "", text)
    text = re.sub(r"\*\*(\S(?:[^*]*\S)?)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(\w(?:[^*]*\w)?)\*(?![\w*])", r"\1", text)
    text = re.sub(r"\\([*_`|])", r"\1", text)
    return text.replace("::", ":")


def _item(name: str, text: str) -> str:
    return ": ".join(part for part in (name, text) if part)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
