"""What can go wrong in a step: numbers that are not finite, and too little memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dream_training.choices import MEMORY
from dream_training.data.jsonl import write_json_lines
from dream_training.distributed import world
from dream_training.memory import peak_memory, total_memory, used_memory
from dream_training.training.output_folder import FAULTS
from dream_training.training.workers import dead_worker, error_in_worker

if TYPE_CHECKING:
    from dream_training.config import TrainConfig
    from dream_training.objectives.base import TrainingObjective

_GIB = 2**30
_STEPS_WITHOUT_GRADIENT = 5


class StepGuard:
    """Skips steps whose loss or gradient is not finite, up to a limit.

    The batch of each is written to ``faults/step-12.jsonl`` as training data: a run on this file
    with its number of lines as ``batch_size`` repeats the batch.

    Args:
        loss: the objective; its metrics mark a skipped step.
        folder: of the run.
        limit: how many steps may be skipped.
        console: where each is reported.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(self, loss: TrainingObjective, folder: Path, limit: int, console: Console) -> None:
        self.loss, self.folder, self.limit, self.console = loss, folder / FAULTS, limit, console
        self.skipped = 0

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def restore(self, state: Mapping[str, int]) -> None:
        self.skipped = state["skipped"]

    def accepts(self, loss: Tensor, model: nn.Module, step: int, inputs: dict[str, Any]) -> bool:
        """Return whether a step counts, after its backward pass.

        Args:
            loss: scalar.
            model: with its gradients.
            step: the current one, counted from 1.
            inputs: the batch, written to a file if the step does not count.

        Raises:
            FloatingPointError: more steps than the limit were skipped.
        """
        if _all_finite(loss, model):
            return True
        self.skipped += 1
        value = loss.item()
        what = f"loss {value}" if not math.isfinite(value) else f"gradient of loss {value:.3f}"
        path = self._write(step, inputs)
        self.console.print(f"step {step} skipped: {what} is not finite; its batch is in {path}")
        self.drop()
        if self.skipped > self.limit:
            raise FloatingPointError(
                f"{self.skipped} steps had a loss or gradient that is not finite, and "
                f"max_skipped_steps is {self.limit}; their batches are in {self.folder}. A lower "
                "learning_rate, a higher temperature or dtype=float32 may help."
            )
        return False

    def drop(self) -> None:
        """Mark the step as skipped in the metrics."""
        self.loss.metrics = {"skipped": 1.0}

    def _write(self, step: int, inputs: Mapping[str, Any]) -> Path:
        part = f"-process-{world.rank()}" if world.size() > 1 else ""
        path = self.folder / f"step-{step}{part}.jsonl"
        try:
            write_json_lines(path, batch_rows(inputs))
        except OSError as error:  # a full disk must not end a run that can continue
            self.console.print(f"{path} could not be written: {error}")
        return path


def batch_rows(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a batch as training data, from the texts that the collator put into it.

    A batch of tokens alone, as the library's own losses take, gives one row with the tokens of each
    column.
    """
    if "query_texts" not in inputs:
        tokens = {name: v.tolist() for name, v in inputs.items() if name.endswith("input_ids")}
        return [tokens]
    documents, pools = inputs["document_texts"], inputs.get("query_pools")
    positives, rows = inputs["query_positives"], []
    for b, (query, target) in enumerate(zip(inputs["query_texts"], inputs["query_targets"])):
        own = documents if pools is None else [documents[i] for i in pools[b]]
        row = {"query": query, "target": target, "documents": own}
        rows.append(row if positives[b] < 0 else {**row, "positive": positives[b]})
    return rows


@torch.no_grad()
def _all_finite(loss: Tensor, model: nn.Module) -> bool:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    finite = torch.stack([loss.detach().isfinite().all(), *(g.isfinite().all() for g in parts)])
    # Either all processes skip a step or none does.
    return not world.max_over_ranks(int(not finite.all()))


class GradientWatch(TrainerCallback):
    """Reports that no step had a nonzero gradient, so that nothing was learnt.

    Args:
        console: where it is reported, after a few steps and at the end.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._steps = 0
        self._found = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._found:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        parts = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        some = any(bool(part.any()) for part in parts)
        # A skipped step has none, and DeepSpeed does not expose them.
        self._steps += world.max_over_ranks(int(bool(gradients)))
        self._found = bool(world.max_over_ranks(int(some)))
        if self._steps == _STEPS_WITHOUT_GRADIENT and not self._found:
            self.conclude()

    def conclude(self) -> None:
        """Report it if no gradient was nonzero."""
        if self._steps and not self._found:
            steps = "step" if self._steps == 1 else f"{self._steps} steps"
            self.console.print(
                f"Nothing is learnt: every gradient of the {steps} so far was "
                "exactly zero. Every query may have one document to choose from, or all its weight "
                "on one: see dream doctor"
            )


class MemoryWatch(TrainerCallback):
    """Measures the memory of a step, so that an out-of-memory error can say what would fit.

    Attributes:
        resting: bytes in use between two steps: weights, optimiser and documents.
        peak: highest number of bytes in use during a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resting = self.peak = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.resting = used_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.peak = max(self.peak, self.highest())

    def highest(self) -> int:
        """Peak bytes in use since the step began; on a CPU, since the process started."""
        return peak_memory(self.device)

    def capacity(self) -> int:
        """Total bytes of the device."""
        return total_memory(self.device)


def explained(
    error: Exception, config: TrainConfig, watch: MemoryWatch, done: int
) -> Exception | None:
    """Return an error that says what to do about the one that ended a run, or None to keep it.

    Args:
        error: what was raised.
        config: of the run.
        watch: what measured the run.
        done: completed steps.
    """
    if said := dead_worker(error):
        return ChildProcessError(
            f"a process of dataloader_workers (there are {config.data.dataloader_workers}) crashed "
            f"after step {done}: {said}"
        )
    if is_out_of_memory(error):
        return MemoryError(memory_advice(error, config, watch, done + 1))
    return error_in_worker(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "out of memory" in str(error).lower()
    )


def memory_advice(error: BaseException, config: TrainConfig, watch: MemoryWatch, step: int) -> str:
    """Return which settings to lower, and to what, from what was measured up to the error.

    A step takes ``resting + activations`` bytes, and the activations grow with what is embedded and
    read at once. So the share that fits is ``(capacity - resting) / (needed - resting)``, less a
    margin of a tenth.

    Args:
        error: what was raised.
        config: of the run.
        watch: what measured the run.
        step: in which memory ran out.
    """
    capacity, resting = watch.capacity(), watch.resting
    needed = max(watch.highest(), resting) + _asked(error)
    share = 0.9 * max(capacity - resting, 0) / max(needed - resting, 1)
    share = min(share, 0.5)  # it did not fit, whatever the measurement says
    figures = ""
    if watch.highest() and capacity:  # not every system reports them
        figures = (
            f": {needed / _GIB:.2f} GiB were needed, {resting / _GIB:.2f} of them before the step, "
            f"and the device has {capacity / _GIB:.2f}"
        )
    lines = [f"out of memory in step {step}{figures}. To lower, in this order:"]
    steps, drawn = config.optimisation, config.pools.documents_per_query
    length, reader = config.lengths.passage_max_len, config.reader
    texts = steps.batch_size * (1 + (drawn or 1))
    now = steps.mini_batch_size or texts
    if now > 1:
        lines.append(
            f"- mini_batch_size={max(1, int(now * share))} (now {steps.mini_batch_size or 'all'}"
            f"{'' if steps.mini_batch_size else f', at least {texts} texts'}): changes no result "
            "where the retriever has no dropout"
        )
    if drawn is not None and drawn > 2:
        lines.append(f"- documents_per_query={max(2, int(drawn * share))} (now {drawn})")
    if steps.batch_size > 2:
        lines.append(
            f"- batch_size={max(2, int(steps.batch_size * share))} (now {steps.batch_size})"
        )
    lines.append(f"- passage_max_len={max(1, int(length * share))} (now {length})")
    if reader.document_store == MEMORY:
        lines.append(
            f"- document_store_gb, now {reader.document_store_gb:g}, of the {resting / _GIB:.2f} "
            "GiB before the step; or a folder as document_store"
        )
    return "\n".join(lines)


def _asked(error: BaseException) -> int:
    """Bytes that the failed allocation asked for, if the message names them, else 0."""
    found = re.search(r"allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", str(error), re.IGNORECASE)
    if found is None:
        return 0
    unit = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": _GIB}[found[2].lower()]
    return int(float(found[1]) * unit)
