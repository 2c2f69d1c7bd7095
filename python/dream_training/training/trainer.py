"""The library's trainer, with checkpoints to resume from and steps that can be skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import RandomSampler
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from dream_training.checkpointing.folder import Checkpoint, prune_checkpoints, write_checkpoint
from dream_training.checkpointing.state import (
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random,
    restore_weights,
    trained_weights,
)
from dream_training.distributed import world
from dream_training.distributed.engine import check_trainer, engine_arguments
from dream_training.distributed.sharded_trainer import Trainer
from dream_training.distributed.sharding import whole
from dream_training.models.retriever import merged
from dream_training.training.output_folder import CHECKPOINTS
from dream_training.training.workers import leave_signals_to_the_run

if TYPE_CHECKING:
    from rich.console import Console
    from sentence_transformers import SentenceTransformer

    from dream_training.config import TrainConfig
    from dream_training.evaluation import RetrievalEvaluator
    from dream_training.models.averaging import Averaging
    from dream_training.objectives.build import Objective
    from dream_training.training.faults import StepGuard

# The name by which the library's trainer looks for it.
_TRAINER_STATE = "trainer_state"


class Stateful(Protocol):
    """A part of a run whose state a checkpoint keeps."""

    def state(self) -> Any:
        """Return the state in a form that JSON can hold."""

    def restore(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""


class RunTrainer(Trainer):
    """Trains, and writes checkpoints of its own form instead of the trainer's pickles.

    Args:
        parts: of the run beside weights and optimiser, by name; a checkpoint keeps their states.
        identity: what a run must share with a checkpoint to resume from it.
        guard: decides which steps count.
        averaging: of the weights, while the retriever is evaluated.
        console: where a checkpoint that could not be written is reported.
        keep_checkpoints: how many are kept.
    """

    def __init__(
        self,
        *args: Any,
        parts: Mapping[str, Stateful],
        identity: Mapping[str, Any],
        guard: StepGuard,
        averaging: Averaging,
        console: Console,
        keep_checkpoints: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.parts, self.identity, self.guard = parts, identity, guard
        self.averaging = averaging
        self.console, self.keep_checkpoints = console, keep_checkpoints
        self.checkpoint: Checkpoint | None = None
        self._dropping = False

    @property
    def writes_checkpoints(self) -> bool:
        """Whether checkpoints are written: not if the config says so, and not with DeepSpeed."""
        return self.args.save_strategy != "no"

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return Path(str(self.args.output_dir)) / CHECKPOINTS

    def resume(self, checkpoint: Checkpoint) -> None:
        """Train from a checkpoint to the last step; if that is done, only restore the weights."""
        self.checkpoint = checkpoint
        for name, state in checkpoint.document("run")["parts"].items():
            self.parts[name].restore(state)
        if checkpoint.step < self.args.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint.path))
        else:
            restore_weights(self._objective, checkpoint.tensors("weights"))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._dropping:
            self.guard.drop()
        elif self.guard.accepts(loss, model, self.state.global_step + 1, inputs):
            return loss
        if self.is_deepspeed_enabled:
            raise FloatingPointError(
                f"loss or gradient of step {self.state.global_step + 1} are not finite, and "
                "DeepSpeed, which holds the gradients, cannot skip a step"
            )
        # The other batches of the step are dropped too.
        self._dropping = not self.accelerator.sync_gradients
        # Without gradients the optimiser changes neither weights nor averages.
        model.zero_grad(set_to_none=True)
        return torch.zeros_like(loss)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # The model that is saved because of an evaluation is saved inside.
        with self.averaging.applied():
            return super().evaluate(*args, **kwargs)

    def evaluated(self) -> SentenceTransformer:
        """The retriever as it is saved: its adapters merged, which rounds, and is faster."""
        own = whole(self.model)
        return merged(own, private=own is not self.model)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        leave_signals_to_the_run(loader)
        return loader

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        sampler = super().get_batch_sampler(dataset, *args, **kwargs)
        if type(sampler) is DefaultBatchSampler and isinstance(sampler.sampler, RandomSampler):
            if "batch" in (getattr(dataset, "column_names", None) or ()):
                return TaughtBatchSampler(sampler, dataset["batch"])
            return ShuffledBatchSampler(sampler)
        return sampler

    @property
    def _objective(self) -> torch.nn.Module:
        assert isinstance(self.loss, torch.nn.Module)
        return self.loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        # Every rank holds a part of what is sharded.
        moments, optimizer = optimizer_state(self._objective, _inner(self.optimizer))
        weights = trained_weights(self._objective)
        random = world.gather_json(random_state())
        if not world.is_main():
            return
        step = self.state.global_step
        try:
            documents = {
                _TRAINER_STATE: dataclasses.asdict(self.state),
                "optimizer": optimizer,
                "schedule": self.lr_scheduler.state_dict(),
                "random": random,
                "run": {
                    **self.identity,
                    "parts": {name: part.state() for name, part in self.parts.items()},
                },
            }
            tensors = {"weights": weights, "optimizer": moments}
            self.checkpoint = write_checkpoint(self.folder, step, tensors, documents)
            prune_checkpoints(self.folder, self.keep_checkpoints)
        except OSError as error:
            # Training continues: there may be disk space for the next one.
            self.console.print(
                f"The checkpoint of step {step} could not be written ({error}); {self._newest()}",
                style="bold",
            )

    def _newest(self) -> str:
        if self.checkpoint is None:
            return "there is none yet"
        return f"the newest is that of step {self.checkpoint.step}"

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        """Weights are restored with the optimiser, once both are in their final form."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.checkpoint is not None
        assert self.optimizer is not None and self.lr_scheduler is not None
        restore_weights(self._objective, self.checkpoint.tensors("weights"))
        restore_optimizer(
            self._objective,
            _inner(self.optimizer),
            self.checkpoint.tensors("optimizer"),
            self.checkpoint.document("optimizer"),
        )
        self.lr_scheduler.load_state_dict(self.checkpoint.document("schedule"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.checkpoint is not None
        restore_random(self.checkpoint.document("random")[world.rank()])


class ShuffledBatchSampler(DefaultBatchSampler):
    """Batches in an order that depends on seed and epoch alone.

    The library's own sampler continues from the generator's last state, so a run that is resumed
    after its first epoch would see the data in another order.

    Args:
        sampler: the library's, over a random order that its generator draws.
    """

    def __init__(self, sampler: Any) -> None:
        super().__init__(
            sampler.sampler,
            batch_size=sampler.batch_size,
            drop_last=sampler.drop_last,
            valid_label_columns=sampler.valid_label_columns,
            generator=sampler.generator,
            seed=sampler.seed,
        )

    def __iter__(self) -> Iterator[list[int]]:
        assert self.generator is not None
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class TaughtBatchSampler(ShuffledBatchSampler):
    """The batches that share a pool in a folder of ``dream teach``, in a random order.

    In other batches every query would bring a pool of its own for the retriever to embed. A batch
    of fewer lines is left out, as everywhere; the last one may have a line more.

    Args:
        sampler: as in :class:`ShuffledBatchSampler`.
        names: the batch of each line.
    """

    def __init__(self, sampler: Any, names: Sequence[str]) -> None:
        super().__init__(sampler)
        batches: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            batches.setdefault(name, []).append(place)
        self._batches = [own for own in batches.values() if len(own) >= self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        assert self.generator is not None
        self.generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self._batches), generator=self.generator)
        return iter([self._batches[i] for i in order.tolist()])

    def __len__(self) -> int:
        return len(self._batches)


def build_trainer(
    config: TrainConfig,
    model: SentenceTransformer,
    objective: Objective,
    evaluator: RetrievalEvaluator | None,
    *,
    evaluate_first: bool,
    **options: Any,
) -> RunTrainer:
    """Build the trainer of a run.

    Args:
        config: the run.
        model: the retriever.
        objective: loss, data and collator.
        evaluator: evaluates during training, or None.
        evaluate_first: evaluate before the first step too.
        options: as in :class:`RunTrainer`.
    """
    steps, output = config.optimisation, config.output
    set_seed(config.run.seed)
    arguments: dict[str, Any] = {"save_strategy": "no"}
    if evaluator is not None:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": config.evaluation.eval_steps,
            "eval_on_start": evaluate_first,
        }
    if output.save_steps != 0:
        arguments["save_strategy"] = "steps"
        arguments["save_steps"] = output.save_steps or config.evaluation.eval_steps
    args = SentenceTransformerTrainingArguments(
        output_dir=output.output_dir,
        max_steps=steps.max_steps,
        per_device_train_batch_size=steps.batch_size,
        gradient_accumulation_steps=steps.gradient_accumulation_steps,
        learning_rate=steps.learning_rate,
        lr_scheduler_type=steps.lr_scheduler,
        warmup_steps=steps.warmup_steps,
        max_grad_norm=steps.max_grad_norm,
        seed=config.run.seed,
        data_seed=config.run.seed,
        use_cpu=str(model.device) == "cpu",
        dataloader_drop_last=True,
        dataloader_num_workers=config.data.dataloader_workers,
        # Batches of a stream would be cut to as many documents as there are queries.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        batch_sampler="no_duplicates" if objective.no_duplicates else "batch_sampler",
        **arguments,
        **engine_arguments(config.distribution),
    )
    # A card without widget examples would have the trainer make some from the training columns.
    model.model_card_data.widget = [{}]
    trainer = RunTrainer(
        model=model,
        args=args,
        train_dataset=objective.data,
        loss=objective.loss,
        evaluator=evaluator,
        data_collator=objective.collator,
        keep_checkpoints=output.keep_checkpoints,
        **options,
    )
    check_trainer(config.distribution, trainer, config.objective.learnable_temperature)
    if trainer.is_deepspeed_enabled and trainer.writes_checkpoints:
        trainer.console.print("DeepSpeed: no checkpoints are written, because it would pickle them")
        trainer.args.save_strategy = SaveStrategy.NO
    trainer.remove_callback(PrinterCallback)
    model.model_card_data.widget = []
    return trainer


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
