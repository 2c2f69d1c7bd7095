"""A group of config keys: values are coerced to the types of their keys, and checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from dream_kernels.parsing import shortened, why_not_name
from dream_training.choices import check_at_least

# The metadata of a field whose key has another name where keys are not grouped.
FLAT = "flat"
# Of whole numbers: what torch and the trainer can count to.
_LARGEST = 2**53


@dataclass(frozen=True)
class Group:
    """Keys that belong together; their types and values are checked when a group is made.

    Raises:
        ValueError: a value has another type than its key, or is out of range.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for own in dataclasses.fields(self):
            value = _coerced(flat_name(own), hints[own.name], getattr(self, own.name))
            object.__setattr__(self, own.name, value)
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` if a value is out of range."""

    def at_least(self, least: int, *names: str) -> None:
        """Check several whole numbers."""
        for name in names:
            check_at_least(name, getattr(self, name), least)


def flat_name(own: dataclasses.Field) -> str:
    """The name of a group's key where keys are not grouped."""
    return own.metadata.get(FLAT, own.name)


def _coerced(name: str, annotation: Any, value: Any) -> Any:
    """Check ``value`` against the field's type; whole numbers and "1e-4" become floats."""
    allowed = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    if value is None and type(None) in allowed:
        return None
    if float in allowed and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}")
            return number
    for kind in allowed:
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            if kind is int and abs(value) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, got {shortened(value)}")
            if kind is str:
                reason = why_not_name(value)
                if reason is not None:
                    raise ValueError(f"{name} must be text, and {reason}: {shortened(value)}")
            return value
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ValueError(f"{name} must be {names}, got {shortened(value)}")
