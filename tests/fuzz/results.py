"""Evaluations that were saved."""

from __future__ import annotations

from fuzz import scratch
from fuzz.driver import Draws, instrumented, main, refused

with instrumented("dream_training.evaluation.results", "dream_training.json_file"):
    from dream_training.evaluation.results import read_evaluations, write_evaluations

_ROW = (
    b'{"model": "m", "task": "t", "ndcg_at_10": 0.5, "recall_at_10": 1, "documents": 3, '
    b'"query_ndcg_at_10": {"q": 0.5, "r": 0}, "settings": {"split": "test", "k": [1, null]}}'
)
SEEDS = [
    b'\0{"evaluations": [' + _ROW + b'], "environment": {"torch": "2"}}',
    b'\0{"evaluations": [' + _ROW + b", " + _ROW.replace(b"0.5", b"NaN") + b"]}",
    b'\0{"evaluations": []}',
    b"\1[]",
]


def check(data: bytes) -> None:
    """Raise if a file is neither refused by its name nor read and written unchanged."""
    path = scratch.write("evaluation.json", Draws(data[1:]).rest())
    found = []
    if refused(lambda: found.append(read_evaluations(path)), str(path)):
        return
    again = write_evaluations(scratch.folder / "again.json", found[0], {})
    assert repr(read_evaluations(again)) == repr(found[0])


if __name__ == "__main__":
    main(check, SEEDS)
