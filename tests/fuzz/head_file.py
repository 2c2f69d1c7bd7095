"""Head files: YAML and JSON of both forms."""

from __future__ import annotations

from fuzz import scratch
from fuzz.driver import Draws, instrumented, main, refused

with instrumented("dream_kernels", "yaml"):
    from dream_kernels.head_file import read_heads, write_heads

SEEDS = [
    b'\0attn_head_set: "17-3,12-0"\n',
    b"\0attn_head_set: [17-3, 12-0]\nhead_scores: {17-3: 0.5, 12-0: .1}\nprovenance: {a: 1}\n",
    b'\1{"17-3": 0.53, "12-0": 1e-3}',
    b'\1[["17-3", 0.5], ["1-1", 2]]',
    b'\1["17-3", "12-0"]',
    b'\1{"head_scores": {"1-2": 3}, "provenance": {"reader": "x", "n": [1, null, true]}}',
    b"\0a: &a [x, x]\nb: &b [*a, *a]\nc: {<<: {d: 1}}\n",
    b"\0? [a]\n: !!int 1:30\n- 2024-01-01\n",
]


def check(data: bytes) -> None:
    """Raise if a head file is neither refused by its name nor read and written unchanged."""
    draws = Draws(data)
    name = draws.choose(("heads.yaml", "heads.json", "heads.yml", "heads.txt"))
    path = scratch.write(name, draws.rest())
    found = []
    if refused(lambda: found.append(read_heads(path)), str(path)):
        return
    (head_file,) = found
    assert len(set(head_file.heads)) == len(head_file.heads) > 0
    if len(head_file.scores) == len(head_file.heads):
        again = scratch.folder / "again.json"
        head_file.provenance.clear()
        assert read_heads(write_heads(again, head_file)).scores == head_file.scores


if __name__ == "__main__":
    main(check, SEEDS)
