"""``dream heads``: select, write and draw the reader's heads."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dream_kernels import write_heads
from dream_kernels.head_file import head_name
from dream_training.config import TrainConfig
from dream_training.data.jsonl import read_training_data
from dream_training.heads import WITHOUT_LABELS, head_examples, select_heads
from dream_training.loading import load_reader
from dream_training.plots import plot_heads


def run_heads(
    *,
    reader: str,
    data: Path,
    output: Path,
    criterion: str,
    top_k: int,
    examples: int,
    pool_size: int,
    context: str,
    passage_max_len: int,
    null_query: str,
    token_filter: bool,
    point: str,
    seed: int,
) -> None:
    """Run the command; the arguments are its options."""
    console = Console()
    config = TrainConfig(
        reader=reader,
        train_data=str(data),
        head_criterion=criterion,
        context=context,
        passage_max_len=passage_max_len,
        seed=seed,
    )
    chosen = head_examples(
        read_training_data(data), examples, seed, labelled=criterion not in WITHOUT_LABELS
    )
    with console.status("reading ...") as status:
        head_file = select_heads(
            load_reader(config, {}),
            chosen,
            criterion=criterion,
            pool_size=pool_size,
            null_query=null_query,
            token_filter=token_filter,
            point=point,
            seed=seed,
            data_name=str(data),
            reader_name=reader,
            progress=lambda done, total: status.update(f"reading ... {done}/{total} examples"),
        )
    write_heads(output, head_file)
    console.print(f"{'rank':>4}  {'head':>6}  {'score' if head_file.scores else ''}".rstrip())
    for rank, head in enumerate(head_file.heads[:top_k], 1):
        score = f"  {head_file.scores[head]:.4f}" if head_file.scores else ""
        console.print(f"{rank:>4}  {head_name(*head):>6}{score}")
    console.print(f"\nAll {len(head_file.heads)} heads: {output}")
    if head_file.scores:
        console.print(f"Their map: {plot_heads(head_file, output.with_suffix('.png'), top_k)}")
    preferred = head_file.provenance.get("prefers_the_positive")
    if preferred is not None:
        console.print(f"The loss prefers the document known to be relevant in {preferred:.0%}.")
