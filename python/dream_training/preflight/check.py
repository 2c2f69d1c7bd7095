"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAULT = "ok", "warning", "fault"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``"ok"``, ``"warning"`` or ``"fault"``.
        figure: what was measured.
        advice: what to do about it, empty where nothing is to be done.
    """

    name: str
    status: str
    figure: str
    advice: str = ""
