"""What a run measured, step by step and evaluation by evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """What was measured during a run.

    Attributes:
        steps: one dict per step: ``step``, ``loss``, ``seconds`` and the loss's own metrics.
        evaluations: one dict per evaluation: ``step``, ``ndcg_at_10``, ``recall_at_10``.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """The step of the best evaluation, the first one on ties; -1 if there is none."""
        best = max(self.evaluations, key=lambda e: e["ndcg_at_10"], default={"step": -1.0})
        return int(best["step"])

    @property
    def not_improved(self) -> bool:
        """Whether evaluations found no model better than the untrained one."""
        return self.best_step == 0 and len(self.evaluations) > 1

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "evaluations": self.evaluations}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps[:] = state["steps"]
        self.evaluations[:] = state["evaluations"]


def describe(metrics: dict[str, float], brief: bool = False) -> str:
    """A step's metrics as one line of text; a brief one has only loss and speed."""
    if "loss" not in metrics:
        return "skipped" if "skipped" in metrics else ""
    parts = [f"loss {metrics['loss']:.3f}"]
    if metrics.get("tokens") and metrics.get("seconds"):
        parts.append(f"{metrics['tokens'] / metrics['seconds']:,.0f} tokens/s")
    if brief:
        return "  ".join(parts)
    if "weight_on_positive" in metrics:
        parts.append(f"on positive {metrics['weight_on_positive']:.2f}")
    if "entropy" in metrics:
        parts.append(f"entropy {metrics['entropy']:.2f}/{metrics['max_entropy']:.2f}")
    if "temperature" in metrics:
        parts.append(f"temperature {metrics['temperature']:.4f}")
    if "store_hits" in metrics:
        found, asked = metrics["store_hits"], metrics["store_hits"] + metrics["store_misses"]
        parts.append(f"store {found:.0f}/{asked:.0f}")
    return "  ".join(parts)


def describe_best(history: History) -> str:
    """A note on ``best/`` at the end of a run, if it is not the best of the trained models."""
    if history.not_improved:
        before, *after = (e["ndcg_at_10"] for e in history.evaluations)
        return (
            f"NOT BETTER THAN UNTRAINED: nDCG@10 {before:.4f} before training, at most "
            f"{max(after):.4f} after. best/ is the untrained model, last/ the trained one."
        )
    if history.best_step < 0:
        return "Nothing was evaluated: best/ is a copy of last/, the model after the last step."
    return ""
