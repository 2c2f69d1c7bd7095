"""Fixtures for every test of the injection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AttentionInterface, AttentionMaskInterface


@pytest.fixture(autouse=True)
def oracle_is_unregistered() -> Iterator[None]:
    """Unregister the oracle after each test: it has that test's heads and mode."""
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("oracle", None)
