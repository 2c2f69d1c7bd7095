"""What the tests of the kernels share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def language_patched_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches the language's functions at every call of a device function.

    That takes 40 % of its time, and changes nothing after the first call.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, {}
    languages = (interpreter.tl, interpreter.tl.core)

    def restore() -> None:
        while patched:
            patched.popitem()[1].restore()

    def patch_once(function) -> SimpleNamespace:
        seen = tuple(any(x is y for y in function.__globals__.values()) for x in languages)
        if seen not in patched:
            patched[seen] = patch(function)
        return SimpleNamespace(restore=restore)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture(autouse=True)
def no_forms_of_calls() -> Iterator[None]:
    """What calls of the same shapes share depends on what tests change: tile shapes, the device."""
    yield
    call = sys.modules.get("dream_kernels.triton.call")
    if call is not None:
        call._forms.clear()
