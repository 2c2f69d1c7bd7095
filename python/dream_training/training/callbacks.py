"""What happens around the training steps: progress, history, and keeping the best model."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dream_kernels.files import whole_folder
from dream_training.console import EVERY_LINE, Work, progress
from dream_training.distributed import world
from dream_training.history import History, describe
from dream_training.models.retriever import save_retriever
from dream_training.training.output_folder import BEST, LAST

if TYPE_CHECKING:
    from dream_training.objectives.base import TrainingObjective
    from dream_training.objectives.temperature import Temperature


class ProgressCallback(TrainerCallback):
    """Records every step, and shows it: a bar on a terminal, a line now and then elsewhere."""

    def __init__(
        self, loss: TrainingObjective, history: History, console: Console, log_steps: int
    ) -> None:
        self.loss, self.history, self.console, self.log_steps = loss, history, console, log_steps
        self._shown, self._work = ExitStack(), Work("")
        self._begin = self._printed = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._printed = time.monotonic()
        if self.console.is_interactive:
            self._work = self._shown.enter_context(progress("training", state.max_steps))
            self._work.update(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = dict(self.loss.metrics)
        metrics |= {"step": state.global_step, "seconds": time.perf_counter() - self._begin}
        self.history.steps.append(metrics)
        self._work.update(state.global_step, describe(metrics, brief=True))
        late = time.monotonic() - self._printed > EVERY_LINE
        if not self.console.is_interactive and (late or state.global_step % self.log_steps == 0):
            self._printed = time.monotonic()
            self.console.print(f"step {state.global_step}/{state.max_steps}  {describe(metrics)}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not self.history.steps:
            return
        # Objectives without metrics of their own still report their loss to the trainer.
        if "skipped" not in self.history.steps[-1]:
            self.history.steps[-1].setdefault("loss", float(logs["loss"]))

    def close(self) -> None:
        """Stop the bar; safe to call twice."""
        self._shown.close()


class TemperatureCallback(TrainerCallback):
    """Tells a scheduled temperature how much of the run is done.

    Args:
        temperature: of the objective that is trained, ``loss.temperature``.
    """

    def __init__(self, temperature: Temperature) -> None:
        self.temperature = temperature

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.temperature.progress = state.global_step / max(1, state.max_steps - 1)


class KeepBestCallback(TrainerCallback):
    """After every evaluation, saves the model as ``last``, and the best so far as ``best``.

    The untrained model counts as well, where it was evaluated: ``best`` is always one that was
    measured to be best, and where nothing was measured it becomes a copy of ``last``.

    Attributes:
        best_path: the folder of the best model, None while nothing was evaluated.
    """

    def __init__(self, model: Any, history: History, output_dir: Path, console: Console) -> None:
        self.model, self.history, self.console = model, history, console
        self.output_dir = output_dir
        self.best_path: Path | None = None
        self.restore(False)

    def state(self) -> bool:
        """Whether there is a best model; its score is in the history."""
        return self.best_path is not None

    def restore(self, state: bool) -> None:
        """Continue the history, which must be restored before."""
        self.best = max((e["ndcg_at_10"] for e in self.history.evaluations), default=float("-inf"))
        self.best_path = self.output_dir / BEST if state else None

    def finish(self) -> Path:
        """Save the last model, and return the folder of the best; all processes call it."""
        last, best = save_retriever(self.model, self.output_dir / LAST), self.output_dir / BEST

        def copy() -> None:
            if self.best_path is None or not best.is_dir():
                with whole_folder(best) as folder:
                    shutil.copytree(last, folder, dirs_exist_ok=True)

        world.on_main(copy)
        return best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Evaluated before the run: should nothing beat it, it must be there.
        if state.global_step == 0 and self.best_path is None and self.history.evaluations:
            self.best_path = save_retriever(self.model, self.output_dir / BEST)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {
            name.removeprefix("eval_"): float(value)
            for name, value in (metrics or {}).items()
            if name.startswith(("eval_ndcg", "eval_recall"))
        }
        if "ndcg_at_10" not in values:
            return
        evaluation = {"step": float(state.global_step), **values}
        if evaluation in self.history.evaluations:
            return
        self.history.evaluations.append(evaluation)
        better = values["ndcg_at_10"] > self.best
        self.console.print(
            f"step {state.global_step}  nDCG@10 {values['ndcg_at_10']:.4f}  "
            f"recall@10 {values['recall_at_10']:.4f}{'  (best so far)' if better else ''}"
        )
        if state.global_step > 0:
            save_retriever(self.model, self.output_dir / LAST)
        if better:
            self.best = values["ndcg_at_10"]
            self.best_path = save_retriever(self.model, self.output_dir / BEST)
