"""Training data of every form of lines, packed or not, and files of targets."""

from __future__ import annotations

from fuzz import scratch
from fuzz.driver import Draws, instrumented, main, refused

with instrumented("dream_training.data", "dream_kernels.parsing"):
    from dream_training.data.jsonl import iterate_training_rows, write_training_rows

import gzip

NAMES = ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.txt", "a.md", "packed")
SEEDS = [
    b'\0{"query": "q", "target": "t", "documents": ["a", {"title": "x", "text": "y"}]}\n',
    b'\0{"query": "q", "answers": ["t"], "documents": ["a", "b"], "positive": [1, 0]}\n' * 2,
    b'\0{"query": "q", "pos": ["a"], "neg": ["b", "c"], "query_id": 7, "target": "t"}\r\n',
    b'\0{"query": "q", "positive_passages": [{"docid": "1", "title": "x", "text": "y"}], '
    b'"negative_passages": [], "answers": []}\n',
    b'\0{"anchor": "q", "positive": "a", "negative": "b", "negative_2": "c"}\n\n',
    b'\1[{"query": "q", "target": "t", "documents": ["a"]}]',
    b'\0{"text": "' + b"word and word. " * 60 + b'"}\n',
    b"\4" + b"Some words make a sentence. " * 80,
    gzip.compress(b'{"query": "q", "target": "t", "documents": ["a"]}\n').join((b"\2", b"")),
    b'\6{"query": "q", "target": "t", "documents": ["a"]}\n',
    b'\0\xef\xbb\xbf{"query": "\xe2\x80\xa8 \\u0000 \\ud83d\\ude00", "pos": ["\xed\x95\x9c"]}\n',
    b'\x87{"query": "q", "target": "t"}\n{"_id": 3, "answers": ["u"]}\n',
]


def check(data: bytes) -> None:
    """Raise if a file is neither refused by its name nor read as rows that survive writing."""
    draws = Draws(data)
    first = draws.byte()
    name, content = NAMES[first % len(NAMES)], draws.rest()
    if name == "packed":
        name, content = "a.jsonl.gz", gzip.compress(content, 1)
    path, names, options = scratch.write(name, content), [], {}
    if first >= 128:
        options["target_from"] = scratch.write("targets.jsonl", content)
        path = scratch.write("rows.jsonl", b'{"query": "q", "documents": ["a"], "query_id": 3}\n')
        names.append(str(options["target_from"]))
    rows = []
    read = lambda: rows.extend(iterate_training_rows(path, need_target=False, **options))  # noqa: E731
    if refused(read, str(path), *names):
        return
    again = scratch.folder / "again.jsonl"
    write_training_rows(again, rows)
    written = list(iterate_training_rows(again, need_target=False)) if rows else []
    assert [row.as_json() for row in written] == [row.as_json() for row in rows]


if __name__ == "__main__":
    main(check, SEEDS)
