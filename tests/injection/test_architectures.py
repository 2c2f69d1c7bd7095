"""Every architecture that is a decoder: injection is exact, or refused with the reason.

All of them are tried by ``make readers``, which writes the table of ``docs/readers.md``; one of
each kind always.
"""

from __future__ import annotations

import os

import pytest
import transformers

from helpers.decoders import model_types
from helpers.reader_matrix import try_reader
from helpers.readers_table import PAGE, VERSION, cell, read_table, write_column

UPDATE = "DREAM_UPDATE_READERS"
# Plain; window and soft cap; windows and shared keys; sinks; narrow values; layers with states of
# three kinds; chunks; and each reason for a refusal.
SOME = (
    "llama", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3", "qwen3_next", "falcon_h1",
    "jamba", "llama4_text", "minimax", "bart", "bert", "bloom", "doge", "diffllama", "inkling_text",
    "mamba", "roberta", "stablelm",
)  # fmt: skip


@pytest.mark.parametrize("model_type", [name for name in SOME if name in model_types()])
def test_some_readers_are_exact_or_refused(model_type: str) -> None:
    outcome = try_reader(model_type)
    versions, rows = read_table()
    if VERSION in versions:
        assert rows[outcome.name][versions.index(VERSION)] == cell(outcome), f"see {PAGE}"


@pytest.mark.slow
def test_every_reader_is_exact_or_refused() -> None:
    """With the environment variable ``DREAM_UPDATE_READERS`` the table is written."""
    cells = {}
    for model_type in model_types():
        try:
            outcome = try_reader(model_type)
        except Exception as error:
            raise AssertionError(
                f"{model_type} in transformers {transformers.__version__}"
            ) from error
        cells[outcome.name] = cell(outcome)
    if os.environ.get(UPDATE):
        write_column(cells)
    versions, rows = read_table()
    if VERSION not in versions:
        pytest.skip(f"{PAGE} has no column for transformers {VERSION}")
    place = versions.index(VERSION)
    assert {name: row[place] for name, row in rows.items() if row[place]} == cells
