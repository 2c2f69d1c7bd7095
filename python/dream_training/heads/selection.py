"""Choosing the reader's heads that receive the scores."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_kernels import HeadFile
from dream_kernels.injection import WindowError
from dream_training.choices import HEAD_CRITERIA, check_at_least, check_choice
from dream_training.console import progress
from dream_training.heads.gradient import gradient_scores
from dream_training.heads.mass import calibrated_mass, qr_mass, qr_ndcg
from dream_training.reading.reader import Reader

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

NULL_QUERY = "N/A"
HEAD_EXAMPLES = 96
# Lines of a stream from which the examples are drawn.
STREAM_SAMPLE = 10_000
HEAD_POOL = 16
# As many as the paper takes.
CHOSEN_HEADS = 16

# What the score of a head means under each criterion, as written into head files.
MEANINGS = {
    "qr_mass": "attention of the query's tokens to the gold document, minus that of the null "
    "query's",
    "qr_ndcg": "nDCG@10 of the head's own ranking of the pool by that difference",
    "loss_gradient": "first-order drop of the loss per target token when the head's weight moves "
    "from uniform to the document that the loss prefers; needs no labels",
    "random": "none: the heads are in random order",
}
WITHOUT_LABELS = ("loss_gradient", "random")


@dataclass(frozen=True)
class HeadExample:
    """What head selection looks at.

    Attributes:
        query: the question.
        target: the text that the reader predicts.
        documents: candidates, at least one.
        positive: index of the document known to be relevant, or -1.
    """

    query: str
    target: str
    documents: tuple[str, ...]
    positive: int = -1

    @property
    def gold(self) -> str:
        return self.documents[self.positive]


def head_examples(
    data: Dataset | IterableDataset, count: int, seed: int, *, labelled: bool
) -> list[HeadExample]:
    """Draw examples for head selection from training data.

    Args:
        data: with the columns of ``DreamCollator``; of a stream only the beginning is used.
        count: how many, or fewer if there are fewer.
        seed: of the choice.
        labelled: only lines with a known positive.

    Raises:
        ValueError: there are fewer than two.
    """
    if not hasattr(data, "__len__"):
        from datasets import Dataset

        data = Dataset.from_list(list(itertools.islice(data, STREAM_SAMPLE)))
    rows = list(range(len(data)))
    if labelled:
        rows = [row for row, positive in enumerate(data["positive"]) if positive >= 0]
    if len(rows) < 2 and labelled:
        raise ValueError(
            "selecting heads needs training lines with a known positive, and there are "
            f'{len(rows)}: mark some with "positive": true, name a head file, or take '
            "head_criterion loss_gradient, which needs none"
        )
    if len(rows) < 2:
        raise ValueError(f"selecting heads needs at least 2 training lines, got {len(rows)}")
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    return [
        HeadExample(row["query"], row["target"], tuple(row["documents"]), row["positive"])
        for row in (data[row] for row in chosen)
    ]


def select_heads(
    reader: Reader,
    examples: Sequence[HeadExample],
    *,
    criterion: str = "loss_gradient",
    pool_size: int = HEAD_POOL,
    null_query: str = NULL_QUERY,
    token_filter: bool = False,
    point: str = "own",
    seed: int = 0,
    data_name: str = "",
    reader_name: str = "",
) -> HeadFile:
    """Rank all heads of the reader that can receive scores for such texts.

    ``criterion`` is one of

    - ``"qr_mass"``, the QR score of QRHead (Zhang et al., EMNLP 2025): a head is good if a query
      makes it attend to the gold document more than it does anyway. With ``m(q, d)`` the mean
      attention from the tokens of query ``q`` to document ``d``,
      ``score(head) = mean over examples of m(query, gold) - m(null query, gold)``;
    - ``"qr_ndcg"``: nDCG@10 of the ranking that the head makes of the pool by the same difference
      (as QRHead's script for BEIR does);
    - ``"loss_gradient"``, without labels: how much the loss drops when the head reads the document
      that the loss itself prefers (:mod:`dream_training.heads.gradient`);
    - ``"random"``: a random order, to compare with.

    The examples of one pool share their documents, which are read once, and no attention matrix
    is built.

    Args:
        reader: the reader; its own heads do not matter here.
        examples: about 100 suffice; the QR criteria need their positives.
        criterion: see above.
        pool_size: examples per pool. The QR criteria put the gold documents into it,
            ``"loss_gradient"`` all candidates.
        null_query: a query without content; QR criteria only.
        token_filter: QR criteria only: drop the tokens whose score is two deviations below the
            mean of their document, as QRHead does. Off by default: on SmolLM2-135M it changed one
            of the best 16 heads, not the loss with them, and took a fifth more time.
        point: ``"loss_gradient"`` only: where the derivative is taken, ``"own"`` or ``"uniform"``.
        seed: ``"random"`` only.
        data_name: recorded in the file.
        reader_name: recorded in the file.

    Returns:
        Every head, best first, with its score; ``"random"`` has no scores. The provenance says
        how they were found.

    Raises:
        ValueError: the criterion is unknown, there are fewer than two examples, a pool is smaller
            than two, an example lacks the positive that the criterion needs, or every layer has a
            sliding window that is too short for the examples.
    """
    check_choice("criterion", criterion, HEAD_CRITERIA)
    provenance: dict[str, Any] = {
        "criterion": criterion,
        "meaning": MEANINGS[criterion],
        "reader": reader_name,
    }
    if criterion == "random":
        provenance |= {"seed": seed, "date": datetime.date.today().isoformat()}
        layers = usable_layers(reader, make_pools(examples, max(2, pool_size)))
        heads = random_order(reader, seed, layers)
        provenance |= _left_out(reader.model.config.get_text_config().num_hidden_layers, layers)
        return HeadFile(heads, provenance=provenance)
    check_at_least("pool_size", pool_size, 2)
    if len(examples) < 2:
        raise ValueError(f"examples must hold at least 2, got {len(examples)}")
    provenance |= {"data": data_name, "examples": len(examples), "pool_size": pool_size}
    provenance["examples_digest"] = examples_digest(examples)
    provenance |= {"context": reader.context, "passage_max_len": reader.tokens.passage_max_len}
    pools = make_pools(examples, pool_size)
    layers = usable_layers(reader, pools)
    if criterion == "loss_gradient":
        scores, found = _gradient_scores(reader, pools, point)
        provenance |= {"mode": reader.injection.mode, "point": point, **found}
    else:
        unknown = [i for i, example in enumerate(examples) if example.positive < 0]
        if unknown:
            raise ValueError(
                f"criterion {criterion!r} needs the positive of every example, and example "
                f"{unknown[0]} has none; 'loss_gradient' needs none"
            )
        scores = _qr_scores(reader, pools, criterion, null_query, token_filter)
        provenance |= {"null_query": null_query, "token_filter": token_filter}
    provenance["date"] = datetime.date.today().isoformat()
    return _head_file(scores, provenance, layers)


def examples_digest(examples: Sequence[HeadExample]) -> str:
    """A digest of the examples."""
    text = json.dumps([dataclasses.astuple(example) for example in examples])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def usable_layers(reader: Reader, pools: Sequence[Sequence[HeadExample]]) -> list[int]:
    """Return the layers whose heads can receive scores for texts like those of the pools.

    The others have no such attention, or a sliding window that is too short for the texts.

    Raises:
        ValueError: there are none.
    """
    farthest = 0
    for pool in pools:
        documents = list(dict.fromkeys(d for example in pool for d in example.documents))
        lengths = [len(ids) for ids in reader.tokens.documents(documents)]
        queries = reader.tokens.queries([example.query for example in pool])
        targets = reader.tokens.targets([example.target for example in pool])
        suffix = max(len(query) + len(target) for query, target in zip(queries, targets))
        reach = sum(lengths) if reader.context == "joint" else max(lengths)
        farthest = max(farthest, reach + suffix)
    layers = reader.injection.layers_that_reach(farthest)
    if not layers:
        raise WindowError(
            f"no layer of the reader has a sliding window of {farthest} tokens, which the "
            f"documents, query and target of an example need when read {reader.context}ly"
        )
    return layers


def random_order(reader: Reader, seed: int, layers: Sequence[int]) -> list[tuple[int, int]]:
    """Return all heads of some layers of the reader in a random order."""
    count = reader.model.config.get_text_config().num_attention_heads
    heads = [(layer, head) for layer in layers for head in range(count)]
    random.Random(seed).shuffle(heads)
    return heads


def _qr_scores(
    reader: Reader,
    pools: list[Sequence[HeadExample]],
    criterion: str,
    null_query: str,
    token_filter: bool,
) -> Tensor:
    """Mean over all examples, ``[layers, Hq]``."""
    of_query = {"qr_mass": qr_mass, "qr_ndcg": qr_ndcg}[criterion]
    total, counted = torch.zeros(()), 0
    for pool in _shown(pools):
        documents = list(dict.fromkeys(example.gold for example in pool))
        mass = calibrated_mass(
            reader,
            [example.query for example in pool],
            documents,
            null_query=null_query,
            token_filter=token_filter,
        )
        gold = torch.tensor([documents.index(example.gold) for example in pool])
        total = total + of_query(mass, gold).sum(0)
        counted += len(pool)
    return total / counted


def _gradient_scores(
    reader: Reader,
    pools: list[Sequence[HeadExample]],
    point: str,
) -> tuple[Tensor, dict[str, Any]]:
    """Mean over all target tokens, ``[layers, Hq]``, and what to record with it."""
    total, tokens, loss = torch.zeros(()), 0, 0.0
    known, agreed = 0, 0
    for pool in _shown(pools):
        documents = list(dict.fromkeys(d for example in pool for d in example.documents))
        found = gradient_scores(
            reader,
            [example.query for example in pool],
            [example.target for example in pool],
            documents,
            point,
        )
        total = total + found.drop.sum(0)
        tokens += found.target_tokens
        loss += found.loss * found.target_tokens
        for example, preferred in zip(pool, found.preferred.tolist()):
            if example.positive >= 0:
                known += 1
                agreed += documents[preferred] == example.gold
    record: dict[str, Any] = {"loss": round(loss / tokens, 4)}
    if known:
        record["prefers_the_positive"] = round(agreed / known, 4)
    return total / tokens, record


def _shown(pools: list[Sequence[HeadExample]]) -> Iterator[Sequence[HeadExample]]:
    """Yield the pools, and show the examples done as progress."""
    with progress("selecting heads: examples", sum(map(len, pools))) as work:
        for pool in pools:
            yield pool
            work.advance(len(pool))


def _head_file(scores: Tensor, provenance: dict[str, Any], layers: Sequence[int]) -> HeadFile:
    """Rank the heads of some layers; the others are named in the provenance."""
    scores = scores.double()
    ranked = scores.flatten().argsort(descending=True, stable=True).tolist()
    every = (divmod(index, scores.shape[1]) for index in ranked)
    heads = [(layer, head) for layer, head in every if layer in layers]
    provenance |= _left_out(len(scores), layers)
    return HeadFile(
        heads=heads,
        scores={(layer, head): round(scores[layer, head].item(), 6) for layer, head in heads},
        provenance=provenance,
    )


def _left_out(count: int, layers: Sequence[int]) -> dict[str, Any]:
    left_out = [layer for layer in range(count) if layer not in layers]
    return {"layers_left_out": left_out} if left_out else {}


def make_pools(examples: Sequence[HeadExample], pool_size: int) -> list[Sequence[HeadExample]]:
    """Cut the examples into pools of ``pool_size``; a last pool of one joins the one before it."""
    pools = [examples[i : i + pool_size] for i in range(0, len(examples), pool_size)]
    if len(pools) > 1 and len(pools[-1]) == 1:
        pools[-2:] = [[*pools[-2], *pools[-1]]]
    return pools
