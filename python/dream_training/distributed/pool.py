"""One pool of documents for all processes, of which each embeds and reads its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels import Prefix
from dream_training.distributed import world
from dream_training.distributed.gather import gather_rows

if TYPE_CHECKING:
    from dream_training.reading.reader import Reader

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
        """Their places in the pool; none where all texts of this process are another's too."""
        begin = sum(self.counts[: world.rank()])
        return range(begin, begin + self.counts[world.rank()])

    def gather(self, rows: Tensor) -> Tensor:
        """Join the processes' rows; what stands in for an empty share is left out."""
        return gather_rows(rows[: len(self.rows)], self.counts)


def gather_pool(
    query: dict[str, Any], pool: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make one pool of those of all processes, every text once.

    A text that several processes bring belongs to the first of them. So the pool has the order in
    which one process with the rows of all of them would build it.

    Args:
        query: features of this process's queries, with ``positives``.
        pool: features of its documents, with ``texts``.

    Returns:
        The features of the queries, positives pointing into the whole pool; and those of the pool:
        ``texts`` of all processes, ``share``, and the tokens of this process's share alone. An
        empty share has the tokens of one text, which :meth:`Share.gather` leaves out.

    Raises:
        ValueError: the queries have pools of their own.
    """
    if world.size() == 1:
        return query, pool
    if query.get("pools") is not None:
        raise ValueError(
            "gather_across_devices must be false where each query has a pool of its own: no "
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


def read_pool(reader: Reader, pool: dict[str, Any]) -> Prefix:
    """Read the documents of a pool, each in one process, for suffixes that share all of them.

    Documents that are read jointly depend on those before them: then each process reads all.
    """
    texts, share = pool["texts"], pool.get(SHARE)
    if share is None or reader.context == "joint":
        return reader.read(texts)
    return join_pools(reader.read([texts[i] for i in share.rows] or texts[:1]), share)


def read_each(reader: Reader, pool: dict[str, Any]) -> Prefix:
    """Read every document of a pool into a prefix of its own row, each in one process."""
    texts, share = pool["texts"], pool.get(SHARE)
    if share is not None:
        texts = [texts[i] for i in share.rows] or texts[:1]
    prefix = reader.read(texts, [[i] for i in range(len(texts))])
    return prefix if share is None else join_rows(prefix, share)


def tokens_read(prefix: Prefix, reader: Reader, pool: dict[str, Any]) -> int:
    """Tokens that this process has read for a prefix of the pool."""
    share = pool.get(SHARE)
    if share is None or reader.context == "joint":
        return prefix.tokens
    return int(prefix.spans[0, list(share.rows)].diff(dim=-1).sum())


def join_pools(prefix: Prefix, share: Share) -> Prefix:
    """Join prefixes of one row, each the header and a share of the documents without gaps.

    The header is the same in all processes and stands once. Nothing has a gradient.
    """
    spans = prefix.spans[0, : len(share.rows)]  # [C_r, 2]
    header = int(prefix.spans[0, 0, 0])
    end = int(spans[-1, 1]) if len(spans) else header
    tokens = [found[0] for found in world.gather_json([end - header])]
    lengths = share.gather(spans.diff(dim=-1))  # [C, 1]
    ends = header + lengths.cumsum(0)

    def join(states: Tensor) -> Tensor:  # [1, Hkv, P_r, D]
        own = states[0, :, header:end].transpose(0, 1)  # [P_r, Hkv, D]
        joined = gather_rows(own, tokens).transpose(0, 1)
        return torch.cat([states[0, :, :header], joined], dim=1)[None]

    with torch.no_grad():
        layers = [(join(key), join(value)) for key, value in prefix.layers]
    return Prefix(
        layers,
        torch.cat([ends - lengths, ends], dim=-1)[None],
        (header + lengths.max()).reshape(1),
    )


def join_rows(prefix: Prefix, share: Share) -> Prefix:
    """Join prefixes whose rows are one document each. Nothing has a gradient."""
    width = max(world.gather_json(prefix.length))
    mask = prefix.mask
    if mask is None:
        mask = prefix.spans.new_ones(prefix.batch, prefix.length, dtype=torch.bool)
    mask = share.gather(_widened(mask.long(), width, 1)).bool()

    def join(states: Tensor) -> Tensor:
        return share.gather(_widened(states, width, 2))

    with torch.no_grad():
        layers = [(join(key), join(value)) for key, value in prefix.layers]
    return replace(
        prefix,
        layers=layers,
        spans=share.gather(prefix.spans),
        next_position=share.gather(prefix.next_position),
        mask=None if bool(mask.all()) else mask,
    )


def share_of(count: int, process: int | None = None) -> range:
    """Which of ``count`` things fall to a process when they are shared out in order."""
    process = world.rank() if process is None else process
    return range(count * process // world.size(), count * (process + 1) // world.size())


def _widened(states: Tensor, width: int, dim: int) -> Tensor:
    shape = list(states.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([states, states.new_zeros(shape)], dim=dim)


def mean_over_ranks(
    metrics: Mapping[str, float], weights: Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """Metrics of all processes together.

    Args:
        metrics: of this process.
        weights: for means, of how many things this process took the mean; a metric without a
            weight is summed.
        names: of all metrics that any process may have, the same in all of them.

    Returns:
        Means over all things and sums over all processes; a metric that no process has is missing.
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
