"""BEIR folders: three files, and ids of all kinds."""

from __future__ import annotations

from fuzz import scratch
from fuzz.driver import instrumented, main, refused

with instrumented("dream_training.data", "dream_kernels.parsing"):
    from dream_training.data.beir_folder import read_beir_folder
    from dream_training.evaluation.retrieval import RetrievalTask, score_queries

_BREAK = b"\n---\n"
SEEDS = [
    _BREAK.join(files)
    for files in (
        (
            b'{"_id": "d", "title": "t", "text": "x"}\n{"_id": 2, "text": "y", "title": null}\n',
            b'{"_id": "q", "text": "what"}\n',
            b"query-id\tcorpus-id\tscore\nq\td\t1\nq\t2\t0\n",
        ),
        (
            b'\xef\xbb\xbf{"_id": "../../d", "text": "x"}\r\n\r\n',
            b'{"_id": "\xe2\x80\xa8", "text": "what", "more": [1]}',
            b"query-id\tcorpus-id\tscore\r\n\xe2\x80\xa8\t../../d\t-7\r\n",
        ),
    )
]


def check(data: bytes) -> None:
    """Raise if a folder is neither refused by a file's name nor read and evaluated."""
    files = [*data.split(_BREAK), b"", b""]
    folder = scratch.folder / "beir"
    for name, content in zip(("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"), files):
        scratch.write(f"beir/{name}", content)
    found = []
    if refused(lambda: found.append(read_beir_folder(folder)), str(folder), "qrels name unknown"):
        return
    corpus, queries, qrels = found[0]
    assert queries.keys() == qrels.keys()
    assert all(document in corpus for judged in qrels.values() for document in judged)
    if qrels:
        ranking = {query: dict.fromkeys(list(corpus)[:3], 0.5) for query in queries}
        scores = score_queries(RetrievalTask(queries, corpus, qrels), ranking)
        assert all(0 <= value <= 1.0001 for own in scores.values() for value in own.values())


if __name__ == "__main__":
    main(check, SEEDS)
