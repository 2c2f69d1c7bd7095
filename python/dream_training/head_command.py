"""``dream heads``: select, write and draw the reader's heads."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dream_kernels import write_heads
from dream_kernels.head_file import head_name
from dream_training.config import TrainConfig
from dream_training.data.jsonl import read_training_data
from dream_training.heads import select_heads
from dream_training.loading import load_reader
from dream_training.plots import plot_heads
from dream_training.training import known_pairs


def run_heads(
    *,
    reader: str,
    data: Path,
    output: Path,
    top_k: int,
    examples: int,
    pool_size: int,
    context: str,
    passage_max_len: int,
    null_query: str,
    seed: int,
) -> None:
    """Run the command; the arguments are its options."""
    console = Console()
    config = TrainConfig(
        reader=reader,
        train_data=str(data),
        context=context,
        passage_max_len=passage_max_len,
        seed=seed,
    )
    pairs = known_pairs(read_training_data(data), examples, seed)
    with console.status("reading ...") as status:
        head_file = select_heads(
            load_reader(config, {}),
            pairs,
            pool_size=pool_size,
            null_query=null_query,
            data_name=str(data),
            reader_name=reader,
            progress=lambda done, total: status.update(f"reading ... {done}/{total} examples"),
        )
    write_heads(output, head_file)
    picture = plot_heads(head_file, output.with_suffix(".png"), top_k)
    console.print(f"{'rank':>4}  {'head':>6}  score")
    for rank, head in enumerate(head_file.heads[:top_k], 1):
        console.print(f"{rank:>4}  {head_name(*head):>6}  {head_file.scores[head]:.4f}")
    console.print(f"\nAll {len(head_file.heads)} heads: {output}\nTheir map: {picture}")
