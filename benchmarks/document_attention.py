"""Races ``document_attention`` with scores against PyTorch's own attention without.

``python -m benchmarks.document_attention`` prints medians of alternating runs in one process. The
peer attends to the same keys, joined and expanded as it needs them, under a padding and causal
mask; it is first checked that ours gives the same output when no head is scored.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dream_kernels
from dream_kernels import document_attention


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, named as in :func:`dream_kernels.document_attention`."""

    batch: int = 16
    query_heads: int = 9
    key_heads: int = 3
    head_dim: int = 64
    rows: int = 48
    prefix: int = 1024
    documents: int = 16


def make_tensors(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs: a shared prefix of equal documents, then as many local keys as rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    local = (shape.batch, shape.key_heads, shape.rows, shape.head_dim)
    prefix = (1, shape.key_heads, shape.prefix, shape.head_dim)
    edges = torch.linspace(0, shape.prefix, shape.documents + 1).long()
    spans = torch.stack([edges[:-1], edges[1:]], -1).expand(shape.batch, -1, -1)
    return {
        "query": normal(shape.batch, shape.query_heads, shape.rows, shape.head_dim),
        "key": normal(*local),
        "value": normal(*local),
        "prefix_key": normal(*prefix),
        "prefix_value": normal(*prefix),
        "scores": torch.randn(shape.batch, shape.documents, generator=generator),
        "grad": normal(shape.batch, shape.query_heads, shape.rows, shape.head_dim),
        "spans": spans,
    }


def ours(t: dict[str, Tensor], **options: object) -> Tensor:
    """The operator; nothing is joined or expanded."""
    prefix = (t["prefix_key"], t["prefix_value"])
    return document_attention(
        t["query"], t["key"], t["value"], t["scores"], t["spans"], prefix=prefix, **options
    )  # type: ignore[arg-type]


def sdpa(t: dict[str, Tensor], *, grouped: bool) -> Tensor:
    """PyTorch's attention over the same keys, without scores."""
    batch = len(t["query"])
    key, value = (
        torch.cat([t[f"prefix_{name}"].expand(batch, -1, -1, -1), t[name]], 2)
        for name in ("key", "value")
    )
    rows, length = t["query"].shape[2], key.shape[2]
    visible = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    if not grouped:
        groups = t["query"].shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        t["query"], key, value, attn_mask=visible, enable_gqa=grouped
    )


def timed(run: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    start = time.perf_counter()
    output = run()
    middle = time.perf_counter()
    torch.autograd.grad(output, leaves, grad)
    return middle - start, time.perf_counter() - middle


def main() -> None:
    """Run the race and print one table per dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="alternating runs (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape()
    print(
        f"dream-kernels {dream_kernels.__version__}, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads\n{shape}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        t = make_tensors(shape, dtype)
        error = (ours(t, heads=()) - sdpa(t, grouped=False)).abs().max().item()
        allowed = 1e-5 if dtype == torch.float32 else 2e-2
        if not error < allowed:
            raise SystemExit(f"{dtype}: the plain outputs differ by {error:.2g}; nothing is timed")
        leaves = {name: t[name].requires_grad_() for name in ("query", "key", "value", "scores")}
        plain = [leaves["query"], leaves["key"], leaves["value"]]
        racers = {
            "ours, all heads scored": (lambda t=t: ours(t), list(leaves.values())),
            "ours, no head scored": (lambda t=t: ours(t, heads=()), plain),
            "sdpa, no scores": (lambda t=t: sdpa(t, grouped=False), plain),
            "sdpa, no scores, enable_gqa": (lambda t=t: sdpa(t, grouped=True), plain),
            "reference, all heads scored": (
                lambda t=t: ours(t, impl="reference"),
                list(leaves.values()),
            ),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in racers}
        for run in range(arguments.runs + 1):
            for name, (forward, wanted) in racers.items():
                pair = timed(forward, wanted, t["grad"])
                if run:  # the first is a warm-up
                    times[name].append(pair)
        print(f"\n{str(dtype).removeprefix('torch.')}: median ms, and ratio of the sum to ours")
        print(f"{'':30}{'forward':>9}{'backward':>10}{'sum':>8}{'ratio':>8}")
        own = statistics.median(sum(pair) for pair in times["ours, all heads scored"])
        for name, pairs in times.items():
            forward, backward = (statistics.median(column) for column in zip(*pairs, strict=True))
            total = statistics.median(map(sum, pairs))
            print(
                f"{name:30}{1e3 * forward:9.1f}{1e3 * backward:10.1f}{1e3 * total:8.1f}"
                f"{total / own:8.2f}"
            )


if __name__ == "__main__":
    main()
