"""What a run checks and reads before it builds or writes anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dream_kernels.files import recover
from dream_training.config import TrainConfig
from dream_training.console import make_console, show_on
from dream_training.distributed import world
from dream_training.evaluation import RetrievalEvaluator
from dream_training.evaluation.tasks import check_tasks
from dream_training.json_file import write_json
from dream_training.models.loading import check_models
from dream_training.objectives.build import check_data
from dream_training.training.inputs import load_training_data, make_evaluator
from dream_training.training.output_folder import (
    CHECKPOINTS,
    check_inputs,
    check_unused,
    claimed,
)
from dream_training.training.resuming import (
    check_identity,
    find_checkpoint,
    identity_of,
)
from dream_training.training.taught import check_taught

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from dream_training.checkpointing.folder import Checkpoint


@dataclass(frozen=True)
class Prepared:
    """A run whose settings and data are checked, and whose output folder is its own.

    Attributes:
        config: with the device of this process.
        given: the config as it was given, for ``config.json``.
        data: the training data, for what looks at it: heads, examples, digests.
        steps_data: the same for the steps; an endless stream with ``streaming``.
        evaluator: evaluates during training, or None.
        identity: what a checkpoint must share with the run.
        checkpoint: where the run resumes, or None.
        console: where it prints.
    """

    config: TrainConfig
    given: dict[str, Any]
    data: Dataset | IterableDataset
    steps_data: Dataset | IterableDataset
    evaluator: RetrievalEvaluator | None
    identity: dict[str, Any]
    checkpoint: Checkpoint | None
    console: Console

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output.output_dir)


@contextmanager
def prepared(
    config: TrainConfig,
    data: Dataset | IterableDataset | None,
    evaluator: RetrievalEvaluator | None,
    console: Console | None,
    resume: bool,
    overwrite: bool,
) -> Iterator[Prepared]:
    """Check and read what a run needs; its output folder is its own inside the block.

    Raises what :func:`~dream_training.training.driver.train` names.
    """
    given = config.flat()
    device = world.join(config.run.device, config.distribution.distributed_timeout)
    config = config.with_changes(device=device)
    console = (console or make_console()) if world.is_main() else Console(quiet=True)
    show_on(console)
    output_dir = Path(config.output.output_dir)
    check_inputs(
        output_dir,
        reader=config.reader.model if config.needs_reader else None,
        taught=config.data.taught,
        retriever=config.retriever.model,
        train_data=config.data.train_data,
        eval_data=config.evaluation.eval_data,
    )
    check_models(config.reader.model if config.needs_reader else None, config.retriever.model)
    if not overwrite:
        world.on_main(lambda: check_unused(output_dir, resume))
    endless = config.data.streaming and data is None
    seed = config.run.seed
    if data is None:
        data = load_training_data(config.data, seed)
        check_taught(config)
    check_data(data, config.optimisation, config.objective)
    if evaluator is None:
        evaluator = make_evaluator(config.evaluation, seed)
    check_tasks(config.evaluation.final_tasks or [])
    steps_data = load_training_data(config.data, seed, endless=True) if endless else data
    with _own_folder(output_dir, resume, overwrite):
        identity = identity_of(config, data)
        checkpoint = find_checkpoint(output_dir / CHECKPOINTS, console) if resume else None
        if checkpoint is not None:
            check_identity(checkpoint, identity)
        elif resume:
            check_unused(output_dir, resume, checkpoint=False)
        yield Prepared(config, given, data, steps_data, evaluator, identity, checkpoint, console)


@contextmanager
def _own_folder(output_dir: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keep other runs out of the output folder, and mend what a killed run left in it."""
    with ExitStack() as held:

        def enter() -> None:
            _make_folder(output_dir)
            held.enter_context(claimed(output_dir))
            if not overwrite:  # another run may have ended since
                check_unused(output_dir, resume)
            recover(output_dir)
            recover(output_dir / CHECKPOINTS)

        world.on_main(enter)
        yield


def _make_folder(output_dir: Path) -> None:
    """Make the folder, and show that it can be written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / ".writable", {})
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise OSError(f"output_dir {output_dir} cannot be written: {error}") from error
