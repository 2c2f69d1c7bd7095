"""The text around documents, query and target: plain, the reader's chat template, or a user's own.

A template is rendered with known texts, and what it puts around them is cut out into a
:class:`ReaderPrompt`. No token is in two of its parts: the spans of the documents are exact
whatever the tokenizer merges, and a document has the same tokens alone as beside others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_kernels.parsing import read_text, shortened
from dream_training.choices import CHAT, PLAIN, check_reader_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template that prints today's date would give another prompt every day.
_DATE = "26 Jul 2024"

# Templates need milliseconds; one that needs more has a huge loop, or an endless one.
_SECONDS = 10.0
# Characters of a template, and of what it makes of a text.
_MOST_CHARACTERS = 1 << 20

Render = Callable[[Sequence[str], str, str], str]


@dataclass(frozen=True)
class ReaderPrompt:
    """The text around documents, query and target.

    Header, documents, query and target are tokenised one by one, each with its own text around it
    and as it is tokenised between the others, and joined as tokens: the spans of the documents are
    exact whatever the tokenizer merges. Spaces at the end of a part belong to the next one.

    Attributes:
        header: the text before the documents.
        document: one document; must contain ``{document}``.
        query: what follows the documents; must contain ``{query}``.
        target: the text to predict; must contain ``{target}``.
        bos: put the tokenizer's beginning-of-sequence token, if it has one, before a header that
            does not begin with it.
    """

    header: str = "Documents:\n\n"
    document: str = "{document}\n\n"
    query: str = "Question: {query}\nAnswer:"
    target: str = " {target}"
    bos: bool = True

    def __post_init__(self) -> None:
        for name in ("document", "query", "target"):
            if getattr(self, name).count(f"{{{name}}}") != 1:
                raise ValueError(
                    f"prompt.{name} must contain {{{name}}} once, got {getattr(self, name)!r}"
                )


def load_reader_prompt(
    choice: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase
) -> ReaderPrompt:
    """Make the prompt that a config names.

    Args:
        choice: ``"plain"``, ``"chat"`` for the tokenizer's chat template, or the path of a Jinja
            template, see :func:`template_prompt`.
        tokenizer: the reader's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the template cannot be cut into pieces; the message says why.
    """
    if choice == PLAIN:
        return ReaderPrompt()
    if choice == CHAT:
        return chat_prompt(tokenizer)
    check_reader_prompt(choice)
    path = Path(choice)
    return template_prompt(read_text(path, _MOST_CHARACTERS), tokenizer, str(path))


def chat_prompt(tokenizer: PreTrainedTokenizerBase) -> ReaderPrompt:
    """Cut the tokenizer's chat template; documents and query are asked, the target answers.

    The template alone says which special tokens there are. What ends the answer is not predicted.

    Raises:
        ValueError: there is no chat template, or it changes the texts it is given.
    """
    name = "the reader's chat template"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "reader_prompt 'chat' needs a tokenizer with a chat template, and "
            f"{tokenizer.name_or_path or type(tokenizer).__name__!r} has none"
        )
    plain = ReaderPrompt()

    def render(documents: Sequence[str], query: str, target: str) -> str:
        texts = "".join(plain.document.replace("{document}", text) for text in documents)
        messages = [
            {"role": "user", "content": f"{plain.header}{texts}Question: {query}"},
            {"role": "assistant", "content": target},
        ]
        with _running(name):
            text = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE)
        assert isinstance(text, str)
        return text

    return cut_prompt(render, name, bos=False)


def template_prompt(
    template: str, tokenizer: PreTrainedTokenizerBase, name: str = "reader_prompt"
) -> ReaderPrompt:
    """Cut a Jinja template with ``documents`` (a list of texts), ``query`` and ``target``.

    The documents come in their order, then the query, then the target; the text around every
    document is the same. ``bos_token`` and ``eos_token`` are there too; a template that prints no
    beginning-of-sequence token gets it all the same. What follows the target is left out. As in
    chat templates, a line's block tags leave neither indentation nor line end, and the template
    runs in Jinja's sandbox, for ten seconds at most.

    Args:
        template: its text.
        tokenizer: the reader's.
        name: what errors call the template.

    Raises:
        ValueError: it is not Jinja, or cannot be cut into pieces; the message says why.
    """
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        # No other operator takes hours in one step.
        intercepted_binops = frozenset({"**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            raise SecurityError("powers are not allowed")

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        optimized=False,  # or what is made of constants would be worked out by the compiler
    )
    try:
        compiled = environment.from_string(template)
    except TemplateSyntaxError as error:
        reason = _reason(error)
        raise ValueError(f"{name}:{error.lineno}: not a Jinja template: {reason}") from error
    except (RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        # SyntaxError: of the Python code that Jinja makes, which must not nest too deeply.
        raise ValueError(f"{name}: not a Jinja template: {_reason(error)}") from error
    tokens = {key: getattr(tokenizer, key, None) or "" for key in ("bos_token", "eos_token")}

    def render(documents: Sequence[str], query: str, target: str) -> str:
        with _running(name):
            return compiled.render(documents=list(documents), query=query, target=target, **tokens)

    return cut_prompt(render, name)


class _TooLong(Exception):
    """A template has run for longer than it may."""


@contextmanager
def _running(name: str) -> Iterator[None]:
    """Run a template inside.

    Raises:
        ValueError: the template fails, or takes more than :data:`_SECONDS`.
    """
    # Of this thread's own work: a busy machine makes no template a bad one.
    end = time.thread_time() + _SECONDS

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _TooLong(f"it takes more than {_SECONDS:.0f} seconds")
        return watch

    # Unlike a signal, a trace stops it in any thread and on any system.
    previous = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    except Exception as error:  # a template can call what it likes of what it is given
        raise ValueError(f"{name} fails: {_reason(error)}") from error
    finally:
        sys.settrace(previous)


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)[:500] or type(error).__name__


def cut_prompt(render: Render, name: str, bos: bool = True) -> ReaderPrompt:
    """Find what a template puts around its texts, and that it does so whatever they are.

    Args:
        render: makes the whole text of documents, a query and a target.
        name: what errors call the template.
        bos: as in :class:`ReaderPrompt`.

    Raises:
        ValueError: a text is left out, repeated or changed, the order is another one, or the text
            around depends on what the texts are or how many there are.
    """
    cuts = []
    for probe in _probes():
        text = render(*probe)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(
                f"{name} must print at most {_MOST_CHARACTERS:,} characters, got {len(text):,}"
            )
        cuts.append(_cut(text, *probe, name))
    first = cuts[0]
    for cut in cuts[1:]:
        for where in ("before", "after", "before_target"):
            own, other = getattr(first, where), getattr(cut, where)
            if own != other:
                raise ValueError(
                    f"{name} must not depend on the texts or their number; {_NAMES[where]} it "
                    f"prints once {shortened(own)} and once {shortened(other)}"
                )
    between = sorted({text for cut in cuts for text in cut.between})
    if len(between) > 1:
        raise ValueError(
            f"{name} must put the same text around every document; between two of them it "
            f"prints once {shortened(between[0])} and once {shortened(between[1])}"
        )
    ending, beginning = _share(first.before, between[0], first.after, name)
    answer = first.before_target.rstrip(" ")
    return ReaderPrompt(
        header=first.before[: len(first.before) - len(beginning)],
        document=f"{beginning}{{document}}{ending}",
        query=f"{first.after[len(ending) :]}{{query}}{answer}",
        # A space belongs to the word after it, as tokenizers have it.
        target=f"{first.before_target[len(answer) :]}{{target}}",
        bos=bos,
    )


@dataclass(frozen=True)
class _Cut:
    """What is around the texts of a rendered template."""

    before: str
    between: tuple[str, ...]
    after: str
    before_target: str


_NAMES = {
    "before": "before the first document",
    "after": "between the last document and the query",
    "before_target": "between query and target",
}


def _probes() -> Iterator[tuple[list[str], str, str]]:
    """Texts of other lengths, numbers and kinds, none of which is part of another."""
    kinds = (
        "{} number {}",
        # what a template might escape, shorten, split at or change the case of
        'A longer {}, "<b>quoted</b>" & {{braced}}\n\n' + "with Many words; " * 60 + "number {}",
    )
    for kind in kinds:
        for count in (2, 1, 3):
            documents = [kind.format("document", i) for i in range(count)]
            yield documents, kind.format("query", 0), kind.format("target", 0)


def _cut(text: str, documents: Sequence[str], query: str, target: str, name: str) -> _Cut:
    pieces, end, previous = [], 0, "the beginning"
    named = [(f"documents[{i}]", document) for i, document in enumerate(documents)]
    for label, own in [*named, ("query", query), ("target", target)]:
        found = text.count(own)
        if found != 1:
            raise ValueError(
                f"{name} must print the text of {label} once and as it is; it is "
                f"{'left out or changed' if found == 0 else f'printed {found} times'}"
            )
        begin = text.index(own)
        if begin < end:
            raise ValueError(
                f"{name} must have the documents in their order, then the query, then the target, "
                f"and it has {label} before {previous}"
            )
        pieces.append(text[end:begin])
        end, previous = begin + len(own), label
    return _Cut(pieces[0], tuple(pieces[1:-2]), pieces[-2], pieces[-1])


def _share(before: str, between: str, after: str, name: str) -> tuple[str, str]:
    """Share the text between two documents: the end of the first, the beginning of the second.

    The first part must also begin what follows the last document, and the second part end the
    text before the first one.
    """
    size = next(
        (i for i, (own, other) in enumerate(zip(between, after)) if own != other),
        min(len(between), len(after)),
    )
    if before.endswith(between[size:]):
        return between[:size], between[size:]
    raise ValueError(
        f"{name} must put the same text around every document, the first and the last too; "
        f"{shortened(between)} is between two of them, {shortened(before)} before the first "
        f"and {shortened(after)} after the last: separate documents by what ends each of them, "
        "not by what is between them"
    )
