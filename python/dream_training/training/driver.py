"""Training a retriever as a config says: prepare, assemble, run, finish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dream_training.config import TrainConfig
from dream_training.console import shows_progress
from dream_training.distributed import world
from dream_training.evaluation import RetrievalEvaluator
from dream_training.history import History
from dream_training.json_file import write_json
from dream_training.models.texts import library_keeps_lengths
from dream_training.plots import plot_curve
from dream_training.training.assembly import Given, Run, assemble
from dream_training.training.faults import explained
from dream_training.training.output_folder import CURVE, HISTORY
from dream_training.training.preparation import prepared
from dream_training.training.workers import dead_worker, workers_end

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from dream_kernels import HeadFile
    from dream_training.objectives.verdicts import Verdicts
    from dream_training.training.trainer import RunTrainer


@dataclass
class TrainResult:
    """What a run leaves.

    Attributes:
        model: the retriever after the last step.
        path: the folder to load, ``best/``: the model with the best evaluation, which is the
            untrained one if none was better (``history.not_improved``), or the last model where
            nothing was evaluated.
        history: losses and evaluations.
        interrupted: whether a signal ended the run.
        signal: which one, None if none.
        seconds: duration of the training, evaluations included.
    """

    model: SentenceTransformer
    path: Path
    history: History
    interrupted: bool
    seconds: float
    signal: int | None = None


@shows_progress
def train(
    config: TrainConfig,
    *,
    data: Dataset | IterableDataset | None = None,
    evaluator: RetrievalEvaluator | None = None,
    heads: HeadFile | None = None,
    model: SentenceTransformer | None = None,
    console: Console | None = None,
    evaluate_first: bool = True,
    history: History | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    verdicts: Verdicts | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Train a retriever.

    Writes ``best/`` and ``last/`` (both load with ``SentenceTransformer(path)``), ``heads.yaml``,
    ``config.json``, ``history.json``, ``curve.png`` and ``checkpoints/`` to ``config.output_dir``,
    and for ``dream report`` what :class:`~dream_training.training.run_record.RunRecord` names.
    SIGINT (Ctrl-C) and SIGTERM stop after the current step and keep what there is; a second one
    stops at once.

    Started by ``torchrun`` or ``accelerate launch``, the processes train together: each with
    ``batch_size`` queries of its own in every step, as ``config`` says what they share. Process 0
    writes and prints; the result is the same in all of them.

    Args:
        config: the run.
        data: training data; read from ``config.train_data`` by default.
        evaluator: what to evaluate with; made from ``config.eval_data`` by default.
        heads: the reader's heads; from ``config.heads`` by default.
        model: the untrained retriever; built from the config by default. It gets the config's
            lengths and prompts.
        console: where to print.
        evaluate_first: evaluate before the first step too.
        history: what was measured before; the run adds to it.
        callbacks: the trainer's, beside the run's own.
        verdicts: keeps what the reader says, for this run and others, see
            :class:`~dream_training.objectives.distilled_dream.DistilledDreamLoss`.
        resume: continue from the newest checkpoint that is whole, as if the run had not stopped;
            from the first step if there is none.
        overwrite: a new run deletes what an earlier one wrote to ``output_dir``, once it has
            loaded its models.

    Raises:
        FileNotFoundError: a file of the config is missing.
        FileExistsError: ``output_dir`` has results of an earlier run, and ``overwrite`` is not set,
            nor ``resume`` where there are checkpoints.
        BlockingIOError: another run is writing to ``output_dir``.
        ValueError: something in config, data or checkpoint does not fit, or the data made no step;
            the message says what.
        FloatingPointError: more than ``max_skipped_steps`` steps were not finite.
        ChildProcessError: a process of ``dataloader_workers`` died.
        MemoryError: memory did not suffice; the message says what to lower, and by how much.
        OSError: ``output_dir`` cannot be written.
    """
    given = Given(heads, model, history, callbacks, verdicts, evaluate_first)
    with prepared(config, data, evaluator, console, resume, overwrite) as ready:
        run = assemble(ready, given)
        seconds, interrupted = _run(run)
        return _finish(run, seconds, interrupted)


def _run(run: Run) -> tuple[float, bool]:
    """Make the steps.

    Returns:
        How many seconds they took, and whether a signal ended them.

    Raises:
        ValueError: there was no step to make.
    """
    config, checkpoint, trainer = run.prepared.config, run.prepared.checkpoint, run.trainer
    workers, interrupted = config.data.dataloader_workers, False
    start = time.perf_counter()
    try:
        with run.signals.caught(), workers_end(workers, trainer.data_collator):
            if checkpoint is None:
                trainer.train()
            else:
                trainer.resume(checkpoint)
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        # A signal to a whole control group ends the processes that make batches, too.
        interrupted = run.signals.received is not None and dead_worker(error) is not None
        if not interrupted:
            named = explained(error, config, run.memory, trainer.state.global_step)
            if named is None:
                raise
            raise named from error
    finally:
        run.progress.close()
    interrupted = interrupted or run.signals.received is not None
    if run.steps_made == 0 and not interrupted:
        raise ValueError(
            f"no step was made: train_data {config.data.train_data} gave no batch of "
            f"{config.optimisation.batch_size} lines"
        )
    return time.perf_counter() - start, interrupted


def _finish(run: Run, seconds: float, interrupted: bool) -> TrainResult:
    """Save the models and what was measured, and say how the run ended."""
    config, console, history = run.prepared.config, run.prepared.console, run.history
    run.trainer.averaging.settle()
    path = run.keeper.finish()
    if world.is_main():
        write_json(run.prepared.output_dir / HISTORY, history.state())
        plot_curve(history, run.prepared.output_dir / CURVE)
    run.gradients.conclude()
    if run.steps_made < config.optimisation.max_steps and not interrupted:
        console.print(
            f"The run ended after {run.steps_made} of {config.optimisation.max_steps} steps: a "
            "callback stopped it, or train_data gave no more batches"
        )
    if interrupted:
        console.print(f"Interrupted after {len(history.steps)} steps; the retriever is in {path}")
        _say_how_to_resume(run.trainer, console)
    lengths = config.lengths
    if lengths.query_max_len != lengths.passage_max_len and not library_keeps_lengths():
        console.print(
            "This sentence-transformers has one length for queries and documents, from 6.0 on it "
            "has two: by encode_query both have the longer one, and in dream's commands their own."
        )
    run.record.finish(path, console, interrupted)
    return TrainResult(run.keeper.model, path, history, interrupted, seconds, run.signals.received)


def _say_how_to_resume(trainer: RunTrainer, console: Console) -> None:
    if not trainer.writes_checkpoints:
        console.print("Without checkpoints there is nothing to resume from.")
    elif trainer.checkpoint is None:
        console.print("There is no checkpoint yet: --resume would start at the first step.")
    else:
        console.print(
            f"--resume continues after step {trainer.checkpoint.step}, "
            f"from {trainer.checkpoint.path}"
        )
