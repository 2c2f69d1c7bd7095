"""``dream mine``: give training rows candidates that a retriever ranks high."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dream_kernels.files import is_stream
from dream_training.console import make_console, print_paths, show_on, shows_progress, tracked
from dream_training.data.beir_folder import read_corpus
from dream_training.data.forms import beir
from dream_training.data.jsonl import iterate_training_rows, write_training_rows
from dream_training.data.mining import MiningCounts, MiningOptions, Rank, mine
from dream_training.data.sources import read_rows
from dream_training.data.training_row import TrainingRow, document_text
from dream_training.evaluation import RetrievalTask, search, search_bm25
from dream_training.json_file import write_json

BM25 = "bm25"


@shows_progress
def run_mine(
    *,
    data: str,
    output: Path,
    retriever: str,
    corpus: str | None,
    options: MiningOptions,
    split: str,
    target_from: str | None,
    query_max_len: int | None,
    passage_max_len: int | None,
    batch_size: int,
    device: str | None,
    trust_remote_code: bool = False,
) -> None:
    """Run the command; the arguments are its options."""
    console = show_on(make_console(beside=output))
    read = iterate_training_rows(data, split=split, target_from=target_from, need_target=False)
    rows = list(tracked(read, f"reading {Path(data).name}"))
    texts = read_documents(corpus, data, rows)
    rank: Rank
    settings: dict[str, Any] = {}
    if retriever == BM25:
        rank, package = rank_bm25, "bm25s"
    else:
        rank, settings = dense_rank(
            retriever, query_max_len, passage_max_len, batch_size, device, trust_remote_code
        )
        package = "sentence-transformers"
    mined, counts = mine(rows, texts, rank, options)
    write_training_rows(output, mined)
    console.print(_summary(counts, options))
    if is_stream(output):  # nothing can be beside it
        print_paths(console, {"The lines:": output})
        return
    provenance = provenance_path(output)
    write_json(
        provenance,
        {
            "data": data,
            "corpus": corpus or data,
            "documents": len(texts),
            "corpus_sha256": _digest(texts.values() if isinstance(texts, dict) else texts),
            "retriever": retriever,
            package: importlib.metadata.version(package),
            **asdict(options),
            **settings,
            "counts": asdict(counts),
            "date": datetime.date.today().isoformat(),
        },
    )
    print_paths(console, {"The lines:": output, "How they were made:": provenance})


def provenance_path(output: Path) -> Path:
    """Return where the account of a mined file stands, beside it."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.provenance.json")


def read_documents(
    corpus: str | None, data: str, rows: Iterable[TrainingRow]
) -> dict[str, str] | list[str]:
    """Return the documents to mine from, by id if they come from a corpus.

    Args:
        corpus: a BEIR folder, or a file of lines with ``text`` and perhaps ``title``; None for
            the corpus of ``data`` if that is a BEIR folder, or else the documents of its lines.
        data: the training data.
        rows: its rows.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a line is not valid.
    """
    if corpus is None and not beir.fits(Path(data)):
        return [document for row in rows for document in row.documents]
    source = Path(corpus or data)
    if source.is_dir():
        return read_corpus(source)
    documents: dict[str, str] = {}
    for where, row in read_rows(corpus or data):
        key = str(row.get("_id", where))
        # Nothing is lost where lines share an id.
        documents[where if key in documents else key] = document_text(row, "text", where)
    return documents


def rank_bm25(
    queries: Mapping[str, str], corpus: Mapping[str, str], k: int
) -> Mapping[str, Mapping[str, float]]:
    """Rank by BM25."""
    return search_bm25(RetrievalTask(queries, corpus, {}, keep_identical_ids=True), k)


def dense_rank(
    model: str,
    query_max_len: int | None,
    passage_max_len: int | None,
    batch_size: int,
    device: str | None,
    trust_remote_code: bool = False,
) -> tuple[Rank, dict[str, Any]]:
    """Return what ranks by a sentence-transformers model, and the lengths and prompts it takes.

    Args:
        model: a checkpoint's folder or a hub name.
        query_max_len: tokens of a query; the model's own limit by default.
        passage_max_len: tokens of a document; the same.
        batch_size: texts encoded at once.
        device: where to; None for sentence-transformers' choice.
        trust_remote_code: run code that comes with the model.
    """
    from dream_training.models.retriever import load_sentence_transformer
    from dream_training.models.texts import text_settings

    retriever = load_sentence_transformer(
        model, device=device, trust_remote_code=trust_remote_code, what="retriever"
    )

    def rank(
        queries: Mapping[str, str], corpus: Mapping[str, str], k: int
    ) -> Mapping[str, Mapping[str, float]]:
        return search(
            retriever,
            RetrievalTask(queries, corpus, {}, keep_identical_ids=True),
            query_max_len=query_max_len,
            passage_max_len=passage_max_len,
            batch_size=batch_size,
            k=k,
        )

    return rank, text_settings(retriever, query_max_len, passage_max_len)


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
