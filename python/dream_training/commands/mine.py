"""``dream mine``: give training rows candidates that a retriever ranks high."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dream_training.commands.options import Device, Output, Split, TargetFrom, TrustRemoteCode
from dream_training.console import (
    loading_libraries,
    make_console,
    print_paths,
    show_on,
    shows_progress,
    tracked,
)

if TYPE_CHECKING:
    from dream_training.data.mining import MiningCounts, MiningOptions, Rank

BM25 = "bm25"

Retriever = Annotated[
    str, typer.Option(help="bm25, or a sentence-transformers model: folder or hub name")
]
Corpus = Annotated[
    str | None,
    typer.Option(help="BEIR folder or file of lines with text; by default the data's own"),
]
ExcludeAnswers = Annotated[bool, typer.Option(help="leave out documents in which an answer occurs")]
KeepCandidates = Annotated[
    bool, typer.Option(help="keep the candidates that a line has besides its positives")
]
QueryMaxLen = Annotated[int | None, typer.Option(min=1, help="tokens of a query that are encoded")]
PassageMaxLen = Annotated[
    int | None, typer.Option(min=1, help="tokens of a document that are encoded")
]


@shows_progress
def mine(
    data: Annotated[str, typer.Argument(help="training data of any form")],
    output: Output,
    retriever: Retriever = BM25,
    corpus: Corpus = None,
    per_query: Annotated[int, typer.Option(min=1, help="candidates to add to a line")] = 7,
    first_rank: Annotated[int, typer.Option(min=1, help="best rank to take them from")] = 1,
    last_rank: Annotated[int, typer.Option(min=1, help="last rank to take them from")] = 100,
    choose: Annotated[str, typer.Option(help="random or best of these ranks")] = "random",
    exclude_answers: ExcludeAnswers = False,
    keep_candidates: KeepCandidates = False,
    split: Split = "train",
    target_from: TargetFrom = None,
    query_max_len: QueryMaxLen = None,
    passage_max_len: PassageMaxLen = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts encoded at once")] = 32,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="of the random choice")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add candidates to training lines: documents that BM25 or a retriever ranks high."""
    with loading_libraries():
        from dream_training.data.jsonl import iterate_training_rows, write_training_rows
        from dream_training.data.mining import MiningOptions, read_documents
        from dream_training.data.mining import mine as add_candidates
        from dream_training.evaluation.ranking import dense_rank, rank_bm25

    options = MiningOptions(
        per_query=per_query, first_rank=first_rank, last_rank=last_rank, choose=choose,
        exclude_answers=exclude_answers, keep_candidates=keep_candidates, seed=seed,
    )  # fmt: skip
    console = show_on(make_console(beside=output))
    read = iterate_training_rows(data, split=split, target_from=target_from, need_target=False)
    rows = list(tracked(read, f"reading {Path(data).name}"))
    texts = read_documents(corpus, data, rows)
    rank: Rank
    settings: dict[str, Any]
    if retriever == BM25:
        rank, settings = rank_bm25, {"bm25s": importlib.metadata.version("bm25s")}
    else:
        rank, settings = dense_rank(
            retriever, query_max_len, passage_max_len, batch_size, device, trust_remote_code
        )
    mined, counts = add_candidates(rows, texts, rank, options)
    write_training_rows(output, mined)
    console.print(_summary(counts, options))
    made = {
        "data": data,
        "corpus": corpus or data,
        "documents": len(texts),
        "corpus_sha256": _digest(texts.values() if isinstance(texts, dict) else texts),
        "retriever": retriever,
        **settings,
    }
    print_paths(console, {"The lines:": output, **_write_provenance(output, made, options, counts)})


def _write_provenance(
    output: Path, made: dict[str, Any], options: MiningOptions, counts: MiningCounts
) -> dict[str, Path]:
    """Write beside a file how it was made; returns the path by what it is, none for a stream."""
    from dream_kernels.files import is_stream
    from dream_training.json_file import write_json

    if is_stream(output):
        return {}
    path = output.with_name(f"{output.name.removesuffix('.jsonl')}.provenance.json")
    date = datetime.date.today().isoformat()
    write_json(path, {**made, **asdict(options), "counts": asdict(counts), "date": date})
    return {"How they were made:": path}


def _summary(counts: MiningCounts, options: MiningOptions) -> str:
    left_out = {
        "times the query itself": counts.itself,
        "known positives": counts.known_positives,
        "with an answer": counts.with_answer,
        "in the line already": counts.repeated,
    }
    text = ", ".join(f"{count} {name}" for name, count in left_out.items())
    return (
        f"{counts.mined} candidates for {counts.rows} lines, of ranks {options.first_rank} to "
        f"{options.last_rank}. Left out: {text}.\n"
        f"{counts.short_rows} lines got fewer than {options.per_query}."
    )


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()
