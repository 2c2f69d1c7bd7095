"""``dream data prepare``: training data of any form as JSON lines."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from dream_training.choices import ASKS, BEGINNING, SENTENCE, check_choice
from dream_training.commands.options import (
    Limit,
    Output,
    Source,
    Split,
    TargetFrom,
    TrustRemoteCode,
)
from dream_training.console import (
    loading_libraries,
    make_console,
    show_on,
    shows_progress,
    tracked,
)


@shows_progress
def prepare(
    source: Source,
    output: Output,
    split: Split = "train",
    target_from: TargetFrom = None,
    limit: Limit = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="for raw text: folder, GGUF file or hub name of the model whose tokens count"
        ),
    ] = None,
    passage_len: Annotated[int, typer.Option(min=1, help="words or tokens of a document")] = 90,
    query_len: Annotated[int, typer.Option(min=1, help="words or tokens of a query")] = 16,
    target_len: Annotated[int, typer.Option(min=1, help="words or tokens of a target")] = 32,
    ask: Annotated[
        str,
        typer.Option(
            help="for documents alone: beginning, of passages; or sentence, one from within each "
            "document of a BEIR folder or of lines with text"
        ),
    ] = BEGINNING,
    seed: Annotated[int, typer.Option(help="of the sentences that ask")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write training data of any form as JSON lines that dream train reads.

    Of text without questions (a folder of .txt and .md files, or lines with "text"), a beginning
    becomes the query, its continuation the target, and the passages around it the candidates.
    With --ask sentence one from within each document becomes the query, the next one the target,
    and the document without both the candidate: for a collection whose documents are to be found.
    """
    check_choice("--ask", ask, ASKS)
    with loading_libraries():
        from dream_training.data.inner_sentences import rows_of_sentences
        from dream_training.data.jsonl import iterate_training_rows, write_training_rows
        from dream_training.data.mining import read_documents
        from dream_training.data.raw_text import TextLengths, count_tokens

    console = show_on(make_console(beside=output))
    if ask == SENTENCE:
        documents = read_documents(source, source, [])
        assert isinstance(documents, dict)
        own = rows_of_sentences(documents.items(), seed)
        written = write_training_rows(output, tracked(islice(own, limit), "writing lines", limit))
        console.print(f"{written} lines of {len(documents)} documents: {output}", soft_wrap=True)
        return
    count = None
    if tokenizer is not None:
        from dream_training.models.loading import load_named_tokenizer

        count = count_tokens(load_named_tokenizer(tokenizer, trust_remote_code, "tokenizer"))
    rows = iterate_training_rows(
        source,
        split=split,
        target_from=target_from,
        text_lengths=TextLengths(passage_len, query_len, target_len, count),
        streaming=True,
    )
    written = write_training_rows(output, tracked(islice(rows, limit), "writing lines", limit))
    console.print(f"{written} lines: {output}", soft_wrap=True)
