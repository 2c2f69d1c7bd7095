"""``dream data targets``: targets that a language model writes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dream_training.commands.options import Device, Limit, Output, Source, Split, TrustRemoteCode
from dream_training.console import (
    loading_libraries,
    make_console,
    progress,
    show_on,
    shows_progress,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@shows_progress
def targets(
    source: Source,
    output: Output,
    reader: Annotated[
        str, typer.Option(help="folder, GGUF file or hub name of the model that writes")
    ],
    split: Split = "train",
    limit: Limit = None,
    instruction: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="text file with {document} and {query} in it"
        ),
    ] = None,
    passage_max_len: Annotated[int, typer.Option(min=1, help="tokens of the passage")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens of a target")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="lines generated at once")] = 16,
    overwrite: Annotated[
        bool, typer.Option(help="also for lines that have a target, if their positive is known")
    ] = False,
    dtype: Annotated[str, typer.Option(help="of the weights: auto, float32, bfloat16")] = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Let a language model write targets where lines have a query and a positive, and no answer."""
    with loading_libraries():
        from dream_kernels.parsing import read_text
        from dream_training.data.generated_targets import GenerationCounts, write_targets
        from dream_training.data.jsonl import iterate_training_rows, write_training_rows

    console = show_on(make_console(beside=output))
    rows = list(islice(iterate_training_rows(source, split=split, need_target=False), limit))
    model, tokenizer = _load_writer(reader, dtype, device, trust_remote_code)
    counts = GenerationCounts()
    own: dict[str, Any] = {} if instruction is None else {"instruction": read_text(instruction)}
    with progress("writing targets", len(rows)) as work:
        written = write_targets(
            rows,
            model,
            tokenizer,
            counts,
            passage_max_len=passage_max_len,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=lambda c: work.update(sum(vars(c).values())),
            **own,
        )
        total = write_training_rows(output, written)
    console.print(f"{total} lines: {output}", soft_wrap=True)
    console.print(
        f"{counts.written} targets were written by {reader}, {counts.kept} were there, "
        f"{counts.empty} lines were left out because it wrote nothing"
    )


def _load_writer(
    name: str, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that writes and its tokenizer.

    Raises:
        ValueError: there is no such dtype, or the tokenizer does not fit the model.
    """
    import torch

    from dream_training.choices import DTYPES, check_choice
    from dream_training.models.loading import resolve_model
    from dream_training.models.text_tokens import check_vocabulary
    from dream_training.trust import load_language_model, load_tokenizer

    check_choice("dtype", dtype, DTYPES)
    path = resolve_model(name, dtype, "reader")
    model = load_language_model(
        path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        what="reader",
    ).eval()
    tokenizer = load_tokenizer(path, trust_remote_code, "reader")
    check_vocabulary(tokenizer, model, "reader")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer
