"""``dream train --dry-run``: two real steps with tiny models, and what the real run will cost."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dream_kernels import HeadFile
from dream_training.choices import CHAT, MEMORY, PLAIN
from dream_training.console import duration, print_entry, progress, show_on, shows_progress
from dream_training.models.architectures import save_tiny
from dream_training.preflight.plan import (
    H100_PEAK,
    STEP_SHARE,
    RunPlan,
    architecture_of,
    make_plan,
    measured_rate,
)

if TYPE_CHECKING:
    from dream_training.config import TrainConfig
    from dream_training.history import History

_STEPS = 2
_LETTERS = 40


@shows_progress
def dry_run(config: TrainConfig, console: Console) -> RunPlan:
    """Build everything that a config names in small, run two steps, and print the plan.

    Reader and retriever become a few layers of the same architectures with random weights; data,
    objective, heads, adapters, optimiser and saving are the real ones. Nothing is downloaded for
    the models named in :mod:`dream_training.models.architectures`. Training data that is not there
    yet is made up.

    Raises:
        ValueError, OSError: what would stop the real run: a config, data or model at fault.
    """
    show_on(console)
    rows, found = _rows(config)
    with tempfile.TemporaryDirectory() as folder, progress("two steps with tiny models"):
        history = _two_steps(config, rows, Path(folder))
    losses = ", ".join(f"{step['loss']:.3f}" for step in history.steps)
    console.print(
        f"{_STEPS} steps of {config.objective.name} with tiny random weights of the same "
        f"architectures: losses {losses}"
    )
    if not found:
        console.print(
            f"{config.data.train_data} is not there: made-up lines took its place", style="yellow"
        )
    plan = make_plan(config, max(len(row["documents"]) for row in rows))
    _print_plan(config, plan, console)
    return plan


def _rows(config: TrainConfig) -> tuple[Any, bool]:
    from datasets import Dataset

    from dream_training.training.inputs import load_training_data
    from dream_training.training.taught import check_taught

    try:
        data = load_training_data(replace(config.data, streaming=False), config.run.seed)
        check_taught(config)
        return data, True
    except FileNotFoundError:
        if config.data.taught is not None:  # verdicts cannot be made up
            raise
        count = (
            max(4, config.optimisation.gradient_accumulation_steps) * config.optimisation.batch_size
        )
        words = [f"{i} {'abcdefgh'[i % 8] * _LETTERS}" for i in range(count)]
        rows = [
            {
                "query": f"Which is {w[:8]}?",
                "target": w,
                "documents": [f"It is {w}."],
                "positive": 0,
            }
            for w in words
        ]
        return Dataset.from_list(rows), False


def _two_steps(config: TrainConfig, rows: Any, folder: Path) -> History:
    from dream_training.training.driver import train
    from dream_training.training.inputs import find_heads

    heads = None
    if config.heads.file != "auto":
        find_heads(config, rows)  # a faulty file must show here
        heads = HeadFile(heads=[(0, 0), (1, 0)])
    reader: Any = config.reader.model
    if config.needs_reader:
        reader = save_tiny(
            architecture_of(config.reader.model, "reader", config.run), folder / "reader", seed=0
        )
    retriever = save_tiny(
        architecture_of(config.retriever.model, "retriever", config.run),
        folder / "retriever",
        seed=1,
    )
    small = config.with_changes(
        reader=str(reader),
        retriever=str(retriever),
        retriever_layers=None if config.retriever.retriever_layers is None else 2,
        top_k=None,
        # the tiny reader has no chat template, and later runs cannot use its documents
        reader_prompt=PLAIN if config.reader.reader_prompt == CHAT else config.reader.reader_prompt,
        document_store=None if config.reader.document_store is None else MEMORY,
        # Small batches show as much, but those that share a pool stay together.
        batch_size=config.optimisation.batch_size
        if config.data.taught is not None
        else min(config.optimisation.batch_size, 8),
        max_steps=_STEPS,
        eval_data=None,
        save_steps=0,
        output_dir=str(folder / "run"),
    )
    result = train(small, data=rows, heads=heads, console=Console(file=io.StringIO()))
    saved = json.loads((folder / "run" / "history.json").read_text(encoding="utf-8"))
    assert len(saved["steps"]) == _STEPS
    return result.history


def _print_plan(config: TrainConfig, plan: RunPlan, console: Console) -> None:
    device = torch.device(config.run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if config.run.dtype == "float32" else torch.bfloat16
    rate = measured_rate(device, dtype)
    quantization = config.reader.reader_quantization
    console.print("\nThe plan, at full length of every text:")
    for name, value in (
        (
            "reader",
            f"{config.reader.model}, {plan.reader_weights / 1e6:,.0f} M weights, frozen"
            + ("" if quantization is None else f", quantised: {quantization}")
            if config.needs_reader
            else "none",
        ),
        ("retriever", f"{config.retriever.model}, {plan.retriever_weights / 1e6:,.0f} M weights"),
        ("trained", f"{plan.trained_weights / 1e6:,.1f} M weights"),
        (
            "a step",
            (
                f"{steps} x "
                if (steps := config.optimisation.gradient_accumulation_steps) > 1
                else ""
            )
            + f"{config.optimisation.batch_size} queries over {plan.documents} documents",
        ),
        ("  read", f"{plan.read_tokens:,} tokens of documents, once, without gradient"),
        ("  predict", f"{plan.suffix_tokens:,} tokens of queries and targets, with gradient"),
        ("  encode", f"{plan.encoded_tokens:,} tokens, with gradient"),
        ("  compute", f"{plan.operations / 1e12:,.2f} tera-operations in matrix products"),
        (
            "memory",
            f"{_gib(plan.memory_bytes)}: weights and optimiser {_gib(plan.weight_bytes)}, "
            f"documents {_gib(plan.prefix_bytes)}, activations {_gib(plan.activation_bytes)}",
        ),
        (
            "time here",
            f"{duration(plan.seconds(STEP_SHARE * rate))} for {plan.steps:,} steps: products at "
            f"{rate / 1e12:,.2f} tera-operations a second, measured now, and "
            f"{STEP_SHARE:.0%} of that for a step",
        ),
        (
            "on an H100",
            f"{duration(plan.seconds(STEP_SHARE * H100_PEAK))} at the same share of its data "
            "sheet: computed, not measured",
        ),
    ):
        print_entry(console, f"  {name:<12}", value)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
