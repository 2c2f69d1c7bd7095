"""The values that options can take, and the checks of plain values that go with them.

Imports neither torch nor another module of the project, so that every module can import it, and a
config is checked before anything heavy is loaded.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The reader.
NO_READER = "none"  # of a run that reads nothing
CONTEXTS = ("independent", "joint")
INJECTED_ROWS = ("all", "target")
PLAIN, CHAT = "plain", "chat"  # prompts; any other one is the path of a template
MEMORY = "memory"  # a document store; any other one is a folder
READER_SHARDINGS = ("replicated", "sharded")
READER_QUANTIZATIONS = ("int8", "bnb-8bit", "bnb-4bit")
# Its heads.
HEAD_CRITERIA = ("qr_mass", "qr_ndcg", "loss_gradient", "random")
GRADIENT_POINTS = ("own", "uniform")
# Training data.
POSITIVES = ("first", "each")
TARGET_CHOICES = ("answers", "positive", "positive_sentence", "query")
MINED_CHOICES = ("random", "best")
BEGINNING, SENTENCE = ASKS = ("beginning", "sentence")  # what asks, in documents alone
# The objective.
OBJECTIVES = ("dream", "infonce", "replug", "emdr", "revela")
TEACHINGS = ("direct", "distilled")
TEACHERS = ("mean_log_probability", "probability")
TEACHER_LOSSES = ("kl", "margin")
DIRECTIONS = ("teacher_student", "student_teacher")
CONSTANT = "constant"
SCHEDULES = (CONSTANT, "linear", "cosine", "exponential")
# A learned temperature is kept in this range. Below it one document gets all the weight and no
# other one a gradient; above it all documents weigh the same.
LEARNABLE_RANGE = (0.001, 10.0)
POOLS = ("both", "in_batch", "mined")
LINES_PER_FILE = 256  # of verdicts that dream teach writes
# The run.
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

_short = reprlib.Repr()
_short.maxstring = 60


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value``.

    Raises:
        ValueError: it is not one of ``choices``.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {_short.repr(value)}")
    return value


def check_positive(name: str, value: float) -> float:
    """Return ``value``.

    Raises:
        ValueError: it is not above 0.
    """
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Check a whole number; None passes.

    Raises:
        ValueError: it is below ``least``.
    """
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_reader_prompt(choice: str | os.PathLike[str]) -> None:
    """Check the name of a prompt or the path of a template.

    Raises:
        FileNotFoundError: it is neither.
    """
    if choice in (PLAIN, CHAT):
        return
    try:
        found = Path(choice).is_file()
    except (OSError, ValueError):  # the name is too long, or has a NUL
        found = False
    if not found:
        raise FileNotFoundError(
            f"reader_prompt must be {PLAIN!r}, {CHAT!r} or a Jinja file, and there is no file "
            f"{_short.repr(os.fspath(choice))}"
        )


def check_document_store(
    choice: str | os.PathLike[str] | None, max_gb: float, context: str
) -> None:
    """Check the choice of a document store.

    Raises:
        ValueError: ``max_gb`` is not positive, or the context is not independent.
    """
    check_positive("document_store_gb", max_gb)
    if choice is not None and context != "independent":
        raise ValueError(
            "document_store must be null unless context is 'independent': documents read jointly "
            f"depend on those before them; got {os.fspath(choice)!r} with context {context!r}"
        )


def check_quantization(choice: Any, sharding: str) -> None:
    """Check the quantisation of the reader as far as it can be without what does it.

    Raises:
        ValueError: there is no such name, a method is not named, or the reader is sharded.
    """
    if choice is None:
        return
    if isinstance(choice, str):
        if choice not in READER_QUANTIZATIONS:
            raise ValueError(
                f"reader_quantization must be one of {', '.join(READER_QUANTIZATIONS)} or the keys "
                f"of a config of transformers, got {_short.repr(choice)}"
            )
    elif not isinstance(choice.get("quant_method"), str):
        raise ValueError(
            "reader_quantization must name a quant_method, as configs of transformers do, got "
            f"{_short.repr(choice)}"
        )
    if sharding != "replicated":
        raise ValueError(
            "reader_quantization must be null with reader_sharding 'sharded', which cuts plain "
            "weights"
        )


def check_temperature(start: float, end: float | None, schedule: str, learnable: bool) -> None:
    """Check a temperature and its schedule.

    Raises:
        ValueError: a value is out of range, or the values contradict each other.
    """
    check_positive("temperature", start)
    check_choice("temperature_schedule", schedule, SCHEDULES)
    if end is not None:
        check_positive("temperature_end", end)
    if (end is None) != (schedule == CONSTANT):
        raise ValueError(
            "temperature_end must be given with a temperature_schedule that changes, and only "
            f"then; got temperature_end {end} with schedule {schedule!r}"
        )
    if not learnable:
        return
    if schedule != CONSTANT:
        raise ValueError(
            f"temperature_schedule must be 'constant' with learnable_temperature, got {schedule!r}"
        )
    low, high = LEARNABLE_RANGE
    if not low <= start <= high:
        raise ValueError(
            f"temperature must lie in {low} .. {high} with learnable_temperature, got {start}"
        )


def check_pool(pool: str, documents_per_query: int | None) -> None:
    """Check the choice of a pool.

    Raises:
        ValueError: ``pool`` is unknown, or ``documents_per_query`` is below 1 or has no meaning.
    """
    check_choice("pool", pool, POOLS)
    check_at_least("documents_per_query", documents_per_query, 1)
    if documents_per_query is not None and pool == "in_batch":
        raise ValueError(
            "documents_per_query must be null with pool 'in_batch', which takes one document of "
            f"each query, got {documents_per_query}"
        )


def check_engine(fsdp: bool, fsdp_config: Any, deepspeed: Any) -> None:
    """Check the choice of the engine that trains in several processes.

    Raises:
        ValueError: two engines are chosen, or one that is not chosen has settings.
    """
    if fsdp and deepspeed is not None:
        raise ValueError("fsdp and deepspeed must not both be set: they are two engines")
    if fsdp_config is not None and not fsdp:
        raise ValueError("fsdp_config must be null unless fsdp is true")
