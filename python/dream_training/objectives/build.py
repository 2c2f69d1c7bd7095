"""From a config to its objective: the loss, what brings its batches, and the columns they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from dream_training.distributed import world
from dream_training.objectives.base import TrainingObjective
from dream_training.objectives.collator import DreamCollator, LabelledCollator
from dream_training.objectives.distillation import EmdrLoss, ReplugLoss
from dream_training.objectives.distilled_dream import DistilledDreamLoss
from dream_training.objectives.dream import DreamLoss
from dream_training.objectives.infonce import (
    CachedInBatchInfoNCELoss,
    InBatchInfoNCELoss,
    PoolInfoNCELoss,
)
from dream_training.objectives.revela import TEXT_PROMPT, RevelaLoss
from dream_training.objectives.taught import TaughtCollator, TaughtDreamLoss
from dream_training.objectives.temperature import Temperature
from dream_training.objectives.verdicts import Verdicts
from dream_training.reading.loading import all_heads, load_reader

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer

    from dream_training.config import TrainConfig
    from dream_training.config_groups import ObjectiveConfig, OptimisationConfig, PoolsConfig

Heads = Mapping[int, Sequence[int]]
# Lines whose verdicts a live run keeps, in memory and in every checkpoint: dream teach is for more.
_KEPT_VERDICTS = 100_000


@dataclass(frozen=True)
class Objective:
    """What the trainer is given.

    Attributes:
        loss: a sentence-transformers loss, and what a run needs of it.
        data: the training data in the columns that the loss expects.
        collator: makes batches of texts and tokens.
        no_duplicates: whether equal texts in one batch would count as each other's negatives.
    """

    loss: TrainingObjective
    data: Dataset | IterableDataset
    collator: DreamCollator | LabelledCollator
    no_duplicates: bool = False


def build_objective(
    config: TrainConfig,
    model: SentenceTransformer,
    data: Dataset | IterableDataset,
    heads: Heads,
    verdicts: Verdicts | None = None,
) -> Objective:
    """Build the objective that a config names.

    Args:
        config: the run.
        model: the retriever.
        data: with the columns ``query``, ``target``, ``documents``, ``positive``.
        heads: of the reader, that receive the scores of ``dream``; the others have no use for them.
        verdicts: keeps what the reader says, with ``teaching: distilled``; by default for this run
            alone, where pools come again.

    Raises:
        ValueError: the objective needs labels that the data does not have, or lines that can be in
            one batch.
    """
    wanted, name = config.objective, config.objective.name
    options: dict[str, Any] = {
        "mini_batch_size": config.optimisation.mini_batch_size,
        "gather_across_devices": config.pools.gather_across_devices,
    }
    collator = build_collator(config, model)
    temperature = Temperature(
        wanted.temperature,
        wanted.temperature_end,
        wanted.temperature_schedule,
        wanted.learnable_temperature,
    )
    load = partial(load_reader, config.reader, config.lengths, config.run)
    own: TrainingObjective
    if name == "infonce":
        all_candidates = config.pools.pool == "both" and config.pools.documents_per_query is None
        if all_candidates and not temperature.changes:
            return _library_infonce(config, model, data)
        own = PoolInfoNCELoss(model, temperature, **options)
        data = labelled(data)
    elif config.data.taught is not None:
        own = TaughtDreamLoss(
            model,
            temperature,
            **_teacher(wanted),
            teacher_loss=wanted.teacher_loss,
            mini_batch_size=config.optimisation.mini_batch_size,
        )
    elif name == "dream":
        reader = load(heads)
        if wanted.teaching == "direct":
            own = DreamLoss(model, reader, temperature, **options)
        else:
            if verdicts is None and _pools_come_again(config.pools, data):
                verdicts = Verdicts(shared=False)
            own = DistilledDreamLoss(
                model,
                reader,
                temperature,
                **_teacher(wanted),
                teacher_loss=wanted.teacher_loss,
                **options,
                verdicts=verdicts,
            )
    elif name == "replug":
        own = ReplugLoss(
            model,
            load({}),
            temperature,
            teacher=wanted.teacher,
            **_teacher(wanted),
            **options,
        )
    elif name == "emdr":
        own = EmdrLoss(model, load({}), temperature, **options)
    else:
        # Every text is read, and predicted, at the length that the retriever encodes.
        length = config.lengths.passage_max_len
        reader = load(
            all_heads(config.reader, config.run),
            prompt=TEXT_PROMPT,
            passage_max_len=length,
            target_max_len=length,
        )
        own = RevelaLoss(model, reader, temperature, **options)
    return Objective(own, data, collator)


def build_collator(config: TrainConfig, model: SentenceTransformer) -> DreamCollator:
    """Build what makes the batches of a run, with its pools."""
    if config.data.taught is not None:
        return TaughtCollator(model, config.data.taught_agreeing)
    return DreamCollator(
        model,
        pool=config.pools.pool,
        documents_per_query=config.pools.documents_per_query,
        seed=config.run.seed,
    )


def _pools_come_again(pools: PoolsConfig, data: Dataset | IterableDataset) -> bool:
    """Whether a query has the same candidates in every epoch, and its verdict can be kept."""
    fixed = pools.pool == "mined" and pools.documents_per_query is None
    return fixed and hasattr(data, "__len__") and len(data) <= _KEPT_VERDICTS


def _teacher(objective: ObjectiveConfig) -> dict[str, Any]:
    """The options of what learns from a teacher; its temperature where the config has one."""
    options: dict[str, Any] = {"direction": objective.teacher_direction}
    if objective.teacher_temperature is not None:
        options["teacher_temperature"] = objective.teacher_temperature
    return options


def _library_infonce(config: TrainConfig, model: SentenceTransformer, data: Dataset) -> Objective:
    """The library's own loss: every candidate of the batch, the other queries' too."""
    options: dict[str, Any] = {
        "scale": 1.0 / config.objective.temperature,
        "gather_across_devices": config.pools.gather_across_devices,
    }
    loss: TrainingObjective
    if config.optimisation.mini_batch_size is None:
        loss = InBatchInfoNCELoss(model, **options)
    else:
        loss = CachedInBatchInfoNCELoss(
            model, mini_batch_size=config.optimisation.mini_batch_size, **options
        )
    data = labelled_columns(data)
    check_no_duplicates(data, config.optimisation.batch_size, config.run.seed)
    return Objective(loss, data, LabelledCollator(model), no_duplicates=True)


def check_data(
    data: Dataset | IterableDataset, optimisation: OptimisationConfig, objective: ObjectiveConfig
) -> None:
    """Check that data makes a step, and gives a query something to choose from.

    Args:
        data: with the columns ``query``, ``target``, ``documents``, ``positive``; a stream passes.
        optimisation: says how many lines a step takes.
        objective: says whether they need a known positive.

    Raises:
        ValueError: there are fewer lines than a step takes, or all have the same document.
    """
    if not hasattr(data, "__len__"):
        return
    accumulated = optimisation.gradient_accumulation_steps
    lines = optimisation.batch_size * world.size() * accumulated
    of_step = f"{accumulated} batches" if accumulated > 1 else "one batch"
    if len(data) < lines:
        raise ValueError(
            f"train_data must hold at least {of_step} of {lines // accumulated} lines, "
            f"got {len(data)}"
        )
    if objective.name == "infonce" and len(known := labelled_lines(data)) < lines:
        raise ValueError(
            f"objective 'infonce' needs known positives, at least {of_step} of "
            f"{lines // accumulated} lines with one, and {len(known)} of {len(data)} lines of "
            "train_data have one"
        )
    texts = {text for row in islice(data, lines) for text in row["documents"]}
    if len(texts) < 2 and len(texts.union(*(row["documents"] for row in data))) < 2:
        raise ValueError(
            "train_data must hold at least two distinct documents to choose from, and all "
            f"{len(data)} lines have the same"
        )


def check_no_duplicates(data: Dataset, batch_size: int, seed: int) -> None:
    """Check that lines which share no text fill a batch, as the library's InfoNCE needs.

    Args:
        data: the columns of :func:`labelled_columns`.
        batch_size: how many lines.
        seed: of their order.

    Raises:
        ValueError: they do not.
    """
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    def batches(drop_last: bool) -> NoDuplicatesBatchSampler:
        return NoDuplicatesBatchSampler(
            data,
            batch_size=batch_size,
            drop_last=drop_last,
            generator=torch.Generator(),
            seed=seed,
        )

    if len(list(islice(batches(drop_last=True), world.size()))) == world.size():
        return
    largest = max(map(len, batches(drop_last=False)))
    distinct = len(set(data["positive"]))
    way = "Set" if largest < 2 else f"Lower batch_size to {largest} or less, or set"
    processes = f" in each of {world.size()} processes" if world.size() > 1 else ""
    raise ValueError(
        f"batch_size {batch_size} cannot be filled{processes}: objective 'infonce' takes "
        "lines that share no text, for one line's document counts as wrong for the others, and "
        f"the {len(data)} lines of train_data have {distinct} distinct relevant documents. "
        f"{way} pool: in_batch, where lines may share a document"
    )


def labelled_lines(data: Dataset) -> list[int]:
    """The places of the rows that know their relevant document."""
    return [i for i, positive in enumerate(data["positive"]) if positive >= 0]


def labelled(data: Dataset) -> Dataset:
    """The rows that know their relevant document.

    Raises:
        ValueError: no line knows its relevant document.
    """
    known = labelled_lines(data)
    if not known:
        raise ValueError("objective 'infonce' needs known positives, and no training line has one")
    return data.select(known)


def labelled_columns(data: Dataset | IterableDataset) -> Dataset:
    """(query, positive, negative_1, ...) columns for objectives that need labels.

    Every row gives its relevant document and as many of its other candidates as all rows have.

    Raises:
        ValueError: no line knows its relevant document.
    """
    from datasets import Dataset

    known = list(labelled(data))
    negatives = min(len(row["documents"]) for row in known) - 1
    rows = []
    for row in known:
        documents = list(row["documents"])
        columns = {"query": row["query"], "positive": documents.pop(row["positive"])}
        columns |= {f"negative_{i + 1}": documents[i] for i in range(negatives)}
        rows.append(columns)
    return Dataset.from_list(rows)
