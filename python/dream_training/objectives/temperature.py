"""What divides the cosine similarities: constant, changing over a run, or learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dream_training.choices import CONSTANT, LEARNABLE_RANGE, check_temperature
from dream_training.distributed.gather import replicated


class Temperature(nn.Module):
    r"""The temperature of a retriever's scores.

    With :math:`x` the share of the run that is done, from 0 at the first step to 1 at the last, a
    schedule goes from :math:`\tau_0` to :math:`\tau_1`:

    - ``linear``: :math:`\tau_0 + (\tau_1 - \tau_0)\, x`
    - ``cosine``: :math:`\tau_1 + (\tau_0 - \tau_1)(1 + \cos \pi x) / 2`
    - ``exponential``: :math:`\tau_0 (\tau_1 / \tau_0)^x`

    A learned one is :math:`e^\theta`, :math:`\theta` starting at :math:`\log \tau_0` and kept where
    the temperature lies in :data:`~dream_training.choices.LEARNABLE_RANGE`. The
    parameter is in the objective's ``state_dict``, and the optimizer of a
    ``SentenceTransformerTrainer`` takes it.

    Args:
        start: :math:`\tau_0`.
        end: :math:`\tau_1`; None with ``constant``.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``.
        learnable: whether it is learned; with ``constant`` only.

    Attributes:
        progress: :math:`x`; set by :class:`~dream_training.training.callbacks.TemperatureCallback`.

    Raises:
        ValueError: an argument is out of range, or they do not fit together.
    """

    def __init__(
        self,
        start: float = 0.05,
        end: float | None = None,
        schedule: str = CONSTANT,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(start, end, schedule, learnable)
        self.start, self.end, self.schedule = start, end, schedule
        self.progress = 0.0
        self.log = nn.Parameter(torch.tensor(math.log(start))) if learnable else None

    def forward(self) -> Tensor | float:
        """Return the temperature of this step; a learned one carries its gradient."""
        if self.log is None:
            return self._scheduled()
        # Kept in range before it is used: a bound inside the graph would end its gradient for good.
        with torch.no_grad():
            self.log.clamp_(*map(math.log, LEARNABLE_RANGE))
        return replicated(self.log).exp()

    @property
    def value(self) -> float:
        """The temperature of this step."""
        temperature = self()
        return temperature.item() if isinstance(temperature, Tensor) else temperature

    @property
    def changes(self) -> bool:
        """Whether it may differ from step to step."""
        return self.log is not None or self.end is not None

    def describe(self) -> dict[str, float | str | bool | None]:
        """What a model card says of it."""
        if not self.changes:
            return {"temperature": self.start}
        return {
            "temperature": self.value,
            "temperature_start": self.start,
            "temperature_end": self.end,
            "temperature_schedule": self.schedule,
            "learnable_temperature": self.log is not None,
        }

    def _scheduled(self) -> float:
        start, end, x = self.start, self.end, self.progress
        if end is None:
            return start
        if self.schedule == "linear":
            return start + (end - start) * x
        if self.schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
        return start * (end / start) ** x


def as_temperature(temperature: float | Temperature) -> Temperature:
    """Make a constant temperature of a number.

    Raises:
        ValueError: the number is not positive.
    """
    return temperature if isinstance(temperature, Temperature) else Temperature(temperature)
