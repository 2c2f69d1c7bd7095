"""One pool of documents for all processes, of which each embeds and reads its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dream_training.distributed import world
from dream_training.distributed.gather import gather_rows

SHARE = "share"


@dataclass(frozen=True)
class Share:
    """Which documents of the pool this process embeds and reads.

    Attributes:
        counts: how many each process does, in the order of the pool.
    """

    counts: tuple[int, ...]

    @property
    def rows(self) -> range:
        """Their places in the pool; none if earlier processes have all texts of this one."""
        begin = sum(self.counts[: world.rank()])
        return range(begin, begin + self.counts[world.rank()])

    def gather(self, rows: Tensor) -> Tensor:
        """Join the processes' rows; the placeholder of an empty share is left out."""
        return gather_rows(rows[: len(self.rows)], self.counts)


def gather_pool(
    query: dict[str, Any], pool: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge the pools of all processes into one, every text once.

    A text of several processes belongs to the first of them. So the pool has the order in
    which one process with the rows of all of them would build it.

    Args:
        query: features of this process's queries, with ``positives``.
        pool: features of its documents, with ``texts``.

    Returns:
        The features of the queries, positives pointing into the whole pool; and those of the pool:
        ``texts`` of all processes, ``share``, and the tokens of this process's share only. An
        empty share has the tokens of one text, which :meth:`Share.gather` leaves out.

    Raises:
        ValueError: the queries have pools of their own.
    """
    if world.size() == 1:
        return query, pool
    if query.get("pools") is not None:
        raise ValueError(
            "gather_across_devices must be false if each query has a pool of its own: no "
            "query would get another candidate"
        )
    place: dict[str, int] = {}
    counts, own = [], []
    for process, texts in enumerate(world.gather_json(pool["texts"])):
        before = len(place)
        for row, text in enumerate(texts):
            if text not in place:
                place[text] = len(place)
                if process == world.rank():
                    own.append(row)
        counts.append(len(place) - before)
    mine = pool["texts"]
    rows = torch.tensor(own or [0])
    cut = {
        key: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(mine)
        else value
        for key, value in pool.items()
    }
    positives = [place[mine[i]] if i >= 0 else -1 for i in query["positives"]]
    return (
        {**query, "positives": positives},
        {**cut, "texts": list(place), SHARE: Share(tuple(counts))},
    )


def share_of(count: int, process: int | None = None) -> range:
    """Which of ``count`` items belong to a process when they are divided in order."""
    process = world.rank() if process is None else process
    return range(count * process // world.size(), count * (process + 1) // world.size())


def mean_over_ranks(
    metrics: Mapping[str, float], weights: Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """Metrics of all processes together.

    Args:
        metrics: of this process.
        weights: for means, the number of items in this process's mean; a metric without a weight
            is summed.
        names: of all metrics that any process may have, the same in all of them.

    Returns:
        Means over all items and sums over all processes; a metric that no process has is missing.
    """
    sums = {}
    for name in names:
        weight = weights.get(name, 1.0) if name in metrics else 0.0
        sums[f"{name} weight"] = weight
        sums[name] = weight * metrics[name] if weight else 0.0
    sums = world.sum_over_ranks(sums)
    return {
        name: sums[name] / (sums[f"{name} weight"] if name in weights else 1.0)
        for name in names
        if sums[f"{name} weight"]
    }
