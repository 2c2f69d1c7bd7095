"""The choices of a temperature, checked without torch."""

from __future__ import annotations

CONSTANT = "constant"
SCHEDULES = (CONSTANT, "linear", "cosine", "exponential")

# Where a learned temperature stays. Below, one document gets all the weight and no other a
# gradient; above, all documents weigh the same.
LEARNABLE_RANGE = (0.001, 10.0)


def check_temperature(start: float, end: float | None, schedule: str, learnable: bool) -> None:
    """Check a temperature and what becomes of it.

    Raises:
        ValueError: an argument is out of range, or they do not fit together.
    """
    if not start > 0:
        raise ValueError(f"temperature must be positive, got {start}")
    if schedule not in SCHEDULES:
        raise ValueError(f"temperature_schedule must be one of {SCHEDULES}, got {schedule!r}")
    if end is not None and not end > 0:
        raise ValueError(f"temperature_end must be positive, got {end}")
    if (end is None) != (schedule == CONSTANT):
        raise ValueError(
            "temperature_end must be given with a temperature_schedule that changes, and only "
            f"then; got temperature_end {end} with schedule {schedule!r}"
        )
    if not learnable:
        return
    if schedule != CONSTANT:
        raise ValueError(
            f"temperature_schedule must be 'constant' with learnable_temperature, got {schedule!r}"
        )
    low, high = LEARNABLE_RANGE
    if not low <= start <= high:
        raise ValueError(
            f"temperature must lie in {low} .. {high} with learnable_temperature, got {start}"
        )
