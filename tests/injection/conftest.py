"""What every test of the injection gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AttentionInterface, AttentionMaskInterface


@pytest.fixture(autouse=True)
def oracle_is_unregistered() -> Iterator[None]:
    """The oracle of one test knows its heads and mode, and is no other test's."""
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("oracle", None)
