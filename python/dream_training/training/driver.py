"""The thin driver: config in, sentence-transformers trainer, retriever out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_kernels import HeadFile, write_heads
from dream_kernels.files import recover
from dream_kernels.head_file import read_chosen_heads
from dream_training.checkpointing.documents import StoredDocuments
from dream_training.config import TrainConfig
from dream_training.console import make_console, show_on, shows_progress
from dream_training.data.jsonl import (
    STREAM_BUFFER,
    read_training_data,
    stream_training_data,
)
from dream_training.distributed import world
from dream_training.evaluation import RetrievalEvaluator, sample_queries
from dream_training.evaluation.tasks import check_tasks, read_task
from dream_training.heads.selection import (
    CHOSEN_HEADS,
    HEAD_EXAMPLES,
    WITHOUT_LABELS,
    head_examples,
    select_heads,
)
from dream_training.history import History
from dream_training.json_file import write_json
from dream_training.models.loading import check_models, make_retriever
from dream_training.models.precision import train_in_float32
from dream_training.models.texts import library_keeps_lengths, prepare_retriever
from dream_training.objectives.build import build_objective, check_data
from dream_training.objectives.temperature import Temperature
from dream_training.objectives.verdicts import Verdicts
from dream_training.plots import plot_curve, plot_heads
from dream_training.reading.loading import load_reader
from dream_training.training.callbacks import (
    KeepBestCallback,
    ProgressCallback,
    TemperatureCallback,
)
from dream_training.training.faults import GradientWatch, MemoryWatch, StepGuard, explained
from dream_training.training.output_folder import (
    CHECKPOINTS,
    CONFIG,
    CURVE,
    HEAD_MAP,
    HEADS,
    HISTORY,
    check_inputs,
    check_unused,
    claimed,
    remove_run,
)
from dream_training.training.resuming import (
    check_identity,
    check_mini_batches,
    find_checkpoint,
    identity_of,
)
from dream_training.training.run_record import RunRecord
from dream_training.training.signals import StopSignals
from dream_training.training.trainer import RunTrainer, Stateful, build_trainer
from dream_training.training.workers import dead_worker, workers_end

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback


@dataclass
class TrainResult:
    """What a run leaves behind.

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


def load_training_data(config: TrainConfig, endless: bool = False) -> Dataset | IterableDataset:
    """Read the training data that a config names; a shuffled stream if it says so.

    Args:
        config: names the data.
        endless: a stream begins anew, in another order, when it is through.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: a line is not valid; the message names file and line.
    """
    options: dict[str, Any] = {
        "split": config.train_split,
        "target_from": config.target_from,
        "positives": config.train_positives,
    }
    if config.streaming:
        if endless:
            return stream_training_data(config.train_data, **options, endless_seed=config.seed)
        stream = stream_training_data(config.train_data, **options)
        return stream.shuffle(seed=config.seed, buffer_size=STREAM_BUFFER)
    return read_training_data(config.train_data, **options)


def find_heads(
    config: TrainConfig, data: Dataset | IterableDataset, examples: int = HEAD_EXAMPLES
) -> HeadFile:
    """Read the head file that a config names, or select heads on the data; choose ``top_k``.

    Args:
        config: names the file, or the criterion.
        data: training data to select on.
        examples: how many of its lines are looked at.

    Raises:
        FileNotFoundError: there is no such head file.
        ValueError: the file is not valid, or the data lacks what the criterion needs.
    """
    if config.heads != "auto":
        return read_chosen_heads(config.heads, config.top_k)
    criterion = config.head_criterion
    ranked = select_heads(
        load_reader(config, {}),
        head_examples(data, examples, config.seed, labelled=criterion not in WITHOUT_LABELS),
        criterion=criterion,
        seed=config.seed,
        data_name=config.train_data,
        reader_name=config.reader,
    )
    return ranked.choose(config.top_k or min(CHOSEN_HEADS, len(ranked.heads)))


def make_evaluator(config: TrainConfig) -> RetrievalEvaluator | None:
    """Read the BEIR folder that a config evaluates on, if it names one."""
    if config.eval_data is None:
        return None
    task = read_task(config.eval_data, config.eval_split, config.keep_identical_ids)
    return RetrievalEvaluator(sample_queries(task, config.eval_queries, config.seed))


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
        resume: go on from the newest checkpoint that is whole, as if the run had not stopped; from
            the first step if there is none.
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
    given = asdict(config)
    config = replace(config, device=world.join(config.device, config.distributed_timeout))
    console = (console or make_console()) if world.is_main() else Console(quiet=True)
    show_on(console)
    output_dir = Path(config.output_dir)
    check_inputs(config)
    check_models(config)
    if not overwrite:
        world.on_main(lambda: check_unused(output_dir, resume))
    own_data = data is None
    data = load_training_data(config) if data is None else data
    check_data(config, data)
    if evaluator is None:
        evaluator = make_evaluator(config)
    check_tasks(config.final_tasks or [])
    steps_data = data
    if config.streaming and own_data:
        steps_data = load_training_data(config, endless=True)
    with ExitStack() as held:

        def prepare() -> None:
            _make_folder(output_dir)
            held.enter_context(claimed(output_dir))
            if not overwrite:  # another run may have ended since
                check_unused(output_dir, resume)
            recover(output_dir)
            recover(output_dir / CHECKPOINTS)

        world.on_main(prepare)
        return _run(
            config, given, data, steps_data, evaluator, heads, model, console, evaluate_first,
            history, callbacks, verdicts, resume,
        )  # fmt: skip


def _run(
    config: TrainConfig,
    given: dict[str, Any],
    data: Dataset | IterableDataset,
    steps_data: Dataset | IterableDataset,
    evaluator: RetrievalEvaluator | None,
    heads: HeadFile | None,
    model: SentenceTransformer | None,
    console: Console,
    evaluate_first: bool,
    history: History | None,
    callbacks: Sequence[TrainerCallback],
    verdicts: Verdicts | None,
    resume: bool,
) -> TrainResult:
    """Train in a folder that is this run's own; ``given`` is the config as it is written there."""
    output_dir = Path(config.output_dir)
    identity = identity_of(config, data)
    checkpoint = find_checkpoint(output_dir / CHECKPOINTS, console) if resume else None
    if checkpoint is not None:
        check_identity(checkpoint, identity, config)
    elif resume:
        check_unused(output_dir, resume, checkpoint=False)
    model = make_retriever(config) if model is None else prepare_retriever(config, model)
    train_in_float32(model)
    if checkpoint is not None:
        check_mini_batches(checkpoint, config, model)
    begun = False

    def begin() -> None:
        """Replace an earlier run, as late as can be: what fails before costs nothing."""
        nonlocal begun
        if world.is_main() and not begun:
            if checkpoint is None:
                remove_run(output_dir)
            write_json(output_dir / CONFIG, given)
        begun = True

    def choose_heads() -> dict[int, list[int]]:
        if checkpoint is None:
            chosen = _choose_heads(config, data, heads, output_dir, console, begin)
        else:
            chosen = {int(k): list(v) for k, v in checkpoint.document("run")["heads"].items()}
        identity["heads"] = chosen
        return chosen

    objective = build_objective(config, model, steps_data, choose_heads, verdicts)
    begin()
    history = history or History()
    record = RunRecord(
        config, model, data, objective.loss, evaluator, history, resumed=checkpoint is not None
    )
    progress = ProgressCallback(objective.loss, history, console, config.log_steps)
    keeper = KeepBestCallback(model, history, output_dir, console)
    guard = StepGuard(objective.loss, output_dir, config.max_skipped_steps, console)
    watch = MemoryWatch(model.device)
    gradients = GradientWatch(console)
    parts: dict[str, Stateful] = {"history": history, "keeper": keeper, "record": record}
    parts["guard"] = guard
    store = getattr(getattr(objective.loss, "reader", None), "store", None)
    if store is not None:
        parts["documents"] = StoredDocuments(
            store, output_dir / CHECKPOINTS, config.keep_checkpoints
        )
    trainer = build_trainer(
        config,
        model,
        objective,
        evaluator,
        evaluate_first=evaluate_first and checkpoint is None,
        parts=parts,
        identity=identity,
        guard=guard,
        console=console,
    )
    signals = StopSignals(checkpoints=trainer.writes_checkpoints)
    for callback in (watch, gradients, progress, keeper, record, signals, *callbacks):
        trainer.add_callback(callback)
    temperature = getattr(objective.loss, "temperature", None)
    if isinstance(temperature, Temperature):
        trainer.add_callback(TemperatureCallback(temperature))
    start = time.perf_counter()
    interrupted = False
    try:
        with signals.caught(), workers_end(config.dataloader_workers, trainer.data_collator):
            if checkpoint is None:
                trainer.train()
            else:
                trainer.resume(checkpoint)
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        # A signal to a whole control group ends the processes that make batches, too.
        interrupted = signals.received is not None and dead_worker(error) is not None
        if not interrupted:
            named = explained(error, config, watch, trainer.state.global_step)
            if named is None:
                raise
            raise named from error
    finally:
        progress.close()
    interrupted = interrupted or signals.received is not None
    seconds = time.perf_counter() - start
    made = max(trainer.state.global_step, 0 if checkpoint is None else checkpoint.step)
    if made == 0 and not interrupted:
        raise ValueError(
            f"no step was made: train_data {config.train_data} gave no batch of "
            f"{config.batch_size} lines"
        )
    path = keeper.finish()
    if world.is_main():
        write_json(output_dir / HISTORY, history.state())
        plot_curve(history, output_dir / CURVE)
    gradients.conclude()
    if made < config.max_steps and not interrupted:
        console.print(
            f"The run ended after {made} of {config.max_steps} steps: a callback stopped it, or "
            "train_data gave no more batches"
        )
    if interrupted:
        console.print(f"Interrupted after {len(history.steps)} steps; the retriever is in {path}")
        _say_how_to_go_on(trainer, console)
    if config.query_max_len != config.passage_max_len and not library_keeps_lengths():
        console.print(
            "This sentence-transformers has one length for queries and documents, from 6.0 on it "
            "has two: by encode_query both have the longer one, and in dream's commands their own."
        )
    record.finish(path, console, interrupted)
    return TrainResult(model, path, history, interrupted, seconds, signals.received)


def _make_folder(output_dir: Path) -> None:
    """Make the folder, and show that it can be written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / ".writable", {})
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise OSError(f"output_dir {output_dir} cannot be written: {error}") from error


def _say_how_to_go_on(trainer: RunTrainer, console: Console) -> None:
    if not trainer.writes_checkpoints:
        console.print("Without checkpoints there is nothing to go on from.")
    elif trainer.checkpoint is None:
        console.print("There is no checkpoint yet: --resume would begin anew.")
    else:
        console.print(
            f"--resume goes on after step {trainer.checkpoint.step}, from {trainer.checkpoint.path}"
        )


def _choose_heads(
    config: TrainConfig,
    data: Dataset | IterableDataset,
    heads: HeadFile | None,
    output_dir: Path,
    console: Console,
    begin: Callable[[], None],
) -> dict[int, list[int]]:
    """The heads that receive the scores: given, read or selected; written and drawn."""

    def choose(heads: HeadFile | None) -> list[list[Any]]:
        if heads is None:
            if config.heads == "auto":
                console.print("selecting the reader's heads ...")
            heads = find_heads(config, data)
        heads = heads.choose(config.top_k)
        begin()
        if world.is_main():
            if heads.scores:
                plot_heads(heads, output_dir / HEAD_MAP)
            write_heads(output_dir / HEADS, heads)
        return [[layer, own] for layer, own in heads.by_layer().items()]

    # A reader that is cut over the processes needs all of them to run.
    if config.heads == "auto" and heads is None and config.reader_sharding == "sharded":
        chosen = world.broadcast_json(choose(None))
    else:
        chosen = world.on_main(lambda: choose(heads))
    return dict(chosen)
