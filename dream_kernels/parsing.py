"""Parsing of untrusted JSON and YAML: a value, or a ``ValueError`` that names the source.

Parsers raise many exceptions for malformed input: deep nesting a ``RecursionError``, a YAML date of
month 13 an error that names no file. YAML's aliases let ten lines expand to more values than memory
holds. All of these become a ``ValueError`` here.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
# The scores of all heads of the largest models take half of this; parsing it takes seconds.
MAX_YAML_CHARACTERS = 1 << 20
# Values of a YAML text with every alias expanded.
MAX_YAML_VALUES = 200_000
# Digits of a number in YAML, whose `1:30:00` form takes quadratic time.
MAX_DIGITS = 300


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to print one of thousands of digits.
        return repr(x) if x.bit_length() <= 128 else f"<whole number of {x.bit_length()} bits>"


def shortened(value: object) -> str:
    """Return ``repr(value)`` of a bounded length, for messages, without traversing all of it."""
    return _Short().repr(value)


def why_not_text(text: str) -> str | None:
    """Return why a string cannot be encoded as UTF-8, or None when it can.

    JSON and YAML can contain half of a surrogate pair, which is not a character and which Arrow,
    tokenizers and files refuse.
    """
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it contains half of a surrogate pair"
    return None


def why_not_name(text: str) -> str | None:
    """Return why a string cannot be an id or path, or None: C libraries end it at a NUL."""
    return "it contains a NUL" if "\0" in text else why_not_text(text)


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than ``max_bytes`` or not UTF-8; the message names the file.
    """
    with Path(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: must have at most {max_bytes:,} bytes, and has more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has an integer of too many digits; the
            message begins with ``source``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {_reason(error)}") from error


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML of plain values: maps, lists, strings, numbers, dates.

    Raises:
        ValueError: it is not such YAML, is too long or nested too deeply, contains itself, or
            expands to more than :data:`MAX_YAML_VALUES` values; the message begins with
            ``source``.
    """
    import yaml

    if len(text) > MAX_YAML_CHARACTERS:
        most = f"{MAX_YAML_CHARACTERS:,}"
        raise ValueError(f"{source}: YAML must have at most {most} characters, got {len(text):,}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid YAML: {_reason(error)}") from error
    except (TypeError, LookupError, AttributeError, OverflowError) as error:
        # From `!!int ""` and the like, whatever the constructor fails on first.
        raise ValueError(
            f"{source}: not valid YAML: a value does not fit its tag: {_reason(error)}"
        ) from error


def _count_values(node: Any, known: dict[int, int | None]) -> int:
    """Return the number of values of a YAML node with its aliases expanded."""
    place = id(node)
    if place in known:
        count = known[place]
        if count is None:
            raise ValueError("a value must not contain itself")
        return count
    known[place] = None
    count = 1
    if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
        raise ValueError(f"a number must have at most {MAX_DIGITS} digits, got {len(node.value):,}")
    if isinstance(node.value, list):
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):
                count += _count_values(child, known)
    if count > MAX_YAML_VALUES:
        raise ValueError(f"it expands to more than {MAX_YAML_VALUES:,} values")
    known[place] = count
    return count


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) or type(error).__name__
