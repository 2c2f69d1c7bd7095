"""The parts of a run, built and joined: heads, retriever, objective, records, trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dream_kernels import HeadFile, write_heads
from dream_training.checkpointing.documents import StoredDocuments
from dream_training.distributed import world
from dream_training.history import History
from dream_training.json_file import write_json
from dream_training.models.averaging import Averaging
from dream_training.models.loading import prepared_retriever
from dream_training.models.precision import train_in_float32
from dream_training.objectives.build import build_objective
from dream_training.objectives.temperature import Temperature
from dream_training.plots import plot_heads
from dream_training.training.callbacks import (
    KeepBestCallback,
    ProgressCallback,
    TemperatureCallback,
)
from dream_training.training.faults import GradientWatch, MemoryWatch, StepGuard
from dream_training.training.inputs import find_heads
from dream_training.training.output_folder import (
    CHECKPOINTS,
    CONFIG,
    HEAD_MAP,
    HEADS,
    remove_run,
)
from dream_training.training.resuming import check_mini_batches
from dream_training.training.run_record import RunRecord
from dream_training.training.signals import StopSignals
from dream_training.training.trainer import RunTrainer, Stateful, build_trainer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from dream_training.objectives.build import Objective
    from dream_training.objectives.verdicts import Verdicts
    from dream_training.training.preparation import Prepared

Heads = dict[int, list[int]]


@dataclass(frozen=True)
class Run:
    """A run that is ready for its first step.

    Attributes:
        prepared: its settings and data.
        trainer: makes the steps.
        history: what they measure.
        progress, keeper, record, gradients, memory, signals: the trainer's callbacks that the end
            of the run asks.
    """

    prepared: Prepared
    trainer: RunTrainer
    history: History
    progress: ProgressCallback
    keeper: KeepBestCallback
    record: RunRecord
    gradients: GradientWatch
    memory: MemoryWatch
    signals: StopSignals

    @property
    def steps_made(self) -> int:
        """Of this run and of those that it resumes."""
        checkpoint = self.prepared.checkpoint
        return max(self.trainer.state.global_step, 0 if checkpoint is None else checkpoint.step)


@dataclass(frozen=True)
class Given:
    """What the caller has already, instead of what the config names.

    Attributes:
        heads: the reader's heads.
        model: the untrained retriever.
        history: what was measured before; the run adds to it.
        callbacks: the trainer's, beside the run's own.
        verdicts: keeps what the reader says, for this run and others.
        evaluate_first: evaluate before the first step too.
    """

    heads: HeadFile | None = None
    model: SentenceTransformer | None = None
    history: History | None = None
    callbacks: Sequence[TrainerCallback] = ()
    verdicts: Verdicts | None = None
    evaluate_first: bool = True


def assemble(prepared: Prepared, given: Given) -> Run:
    """Build the parts of a run, and replace what an earlier run left in its folder.

    The folder is changed as late as can be: what fails before costs nothing.
    """
    config, checkpoint, console = prepared.config, prepared.checkpoint, prepared.console
    model = prepared_retriever(given.model, config.retriever, config.lengths, config.run)
    train_in_float32(model)
    if checkpoint is not None:
        check_mini_batches(checkpoint, config.optimisation.mini_batch_size, model)
    averaging = Averaging(model, config.optimisation.trained_share)
    heads, identity = _Heads(), dict(prepared.identity)
    if config.objective.name == "dream" and config.needs_reader:
        heads = _resumed_heads(prepared) if checkpoint else _choose_heads(prepared, given.heads)
        identity["heads"] = heads.by_layer
    objective = build_objective(config, model, prepared.steps_data, heads.by_layer, given.verdicts)
    _begin(prepared, heads.file)
    history = given.history or History()
    record = RunRecord(
        config.output, config.evaluation, config.run, model, prepared.data, objective.loss,
        prepared.evaluator, history, resumed=checkpoint is not None,
    )  # fmt: skip
    keeper = KeepBestCallback(model, history, prepared.output_dir, console)
    guard = StepGuard(
        objective.loss, prepared.output_dir, config.optimisation.max_skipped_steps, console
    )
    trainer = build_trainer(
        config, model, objective, prepared.evaluator,
        evaluate_first=given.evaluate_first and checkpoint is None,
        parts=_stateful(prepared, objective, history, keeper=keeper, record=record, guard=guard),
        identity=identity, guard=guard, averaging=averaging, console=console,
    )  # fmt: skip
    run = Run(
        prepared, trainer, history, keeper=keeper, record=record,
        progress=ProgressCallback(objective.loss, history, console, config.output.log_steps),
        gradients=GradientWatch(console), memory=MemoryWatch(model.device),
        signals=StopSignals(checkpoints=trainer.writes_checkpoints),
    )  # fmt: skip
    own = (run.memory, run.gradients, run.progress, keeper, record, run.signals)
    for callback in (*own, *given.callbacks):
        trainer.add_callback(callback)
    if isinstance(objective.loss.temperature, Temperature):
        trainer.add_callback(TemperatureCallback(objective.loss.temperature))
    return run


def _stateful(
    prepared: Prepared, objective: Objective, history: History, **others: Stateful
) -> dict[str, Stateful]:
    """What a checkpoint keeps beside weights and optimiser, by name, in the order of restoring."""
    parts: dict[str, Stateful] = {"history": history, **others}
    if (store := objective.loss.store) is not None:
        folder, keep = prepared.output_dir / CHECKPOINTS, prepared.config.output.keep_checkpoints
        parts["documents"] = StoredDocuments(store, folder, keep)
    verdicts = objective.loss.verdicts
    if verdicts is not None and not verdicts.shared:
        parts["verdicts"] = verdicts
    return parts


@dataclass(frozen=True)
class _Heads:
    """The heads that receive the scores, and their file where this process is to write it."""

    by_layer: Heads = field(default_factory=dict)
    file: HeadFile | None = None


def _resumed_heads(prepared: Prepared) -> _Heads:
    assert prepared.checkpoint is not None
    heads = prepared.checkpoint.document("run")["heads"]
    return _Heads({int(layer): list(own) for layer, own in heads.items()})


def _choose_heads(prepared: Prepared, heads: HeadFile | None) -> _Heads:
    """Heads that were given, or those that the config names: read, or selected on the data."""
    config, chosen = prepared.config, []

    def choose() -> list[list[Any]]:
        if heads is None and config.heads.file == "auto":
            prepared.console.print("selecting the reader's heads ...")
        found = find_heads(config, prepared.data) if heads is None else heads
        chosen.append(found.choose(config.heads.top_k))
        return [[layer, own] for layer, own in chosen[0].by_layer().items()]

    # A reader that is cut over the processes needs all of them to run.
    if config.heads.file == "auto" and heads is None and config.reader.reader_sharding == "sharded":
        by_layer = world.broadcast_json(choose())
    else:
        by_layer = world.on_main(choose)
    return _Heads(dict(by_layer), chosen[0] if world.is_main() else None)


def _begin(prepared: Prepared, heads: HeadFile | None) -> None:
    """Replace an earlier run in the folder; write what is known of this one."""
    if not world.is_main():
        return
    folder = prepared.output_dir
    if prepared.checkpoint is None:
        remove_run(folder)
    write_json(folder / CONFIG, prepared.given)
    if heads is not None:
        if heads.scores:
            plot_heads(heads, folder / HEAD_MAP)
        write_heads(folder / HEADS, heads)
