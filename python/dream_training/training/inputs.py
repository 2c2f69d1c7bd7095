"""What a config names and a run needs before it builds anything: data, heads, the evaluator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dream_kernels import HeadFile
from dream_kernels.head_file import read_chosen_heads
from dream_training.config import TrainConfig
from dream_training.config_groups import DataConfig, EvaluationConfig
from dream_training.data.jsonl import (
    STREAM_BUFFER,
    read_training_data,
    stream_training_data,
)
from dream_training.data.taught_folder import read_taught
from dream_training.evaluation import RetrievalEvaluator, sample_queries
from dream_training.evaluation.tasks import read_task
from dream_training.heads.selection import (
    CHOSEN_HEADS,
    HEAD_EXAMPLES,
    WITHOUT_LABELS,
    head_examples,
    select_heads,
)
from dream_training.reading.loading import load_reader

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def load_training_data(
    data: DataConfig, seed: int, endless: bool = False
) -> Dataset | IterableDataset:
    """Read the training data that a config names; a shuffled stream if it says so.

    Args:
        data: names the data.
        seed: of the order of a stream.
        endless: a stream that has ended starts again, in another order.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: a line is not valid; the message names file and line.
    """
    if data.taught is not None:
        return read_taught(data.taught)
    options: dict[str, Any] = {
        "split": data.train_split,
        "target_from": data.target_from,
        "positives": data.train_positives,
    }
    if data.streaming:
        if endless:
            return stream_training_data(data.train_data, **options, endless_seed=seed)
        stream = stream_training_data(data.train_data, **options)
        return stream.shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    return read_training_data(data.train_data, **options)


def find_heads(
    config: TrainConfig, data: Dataset | IterableDataset, examples: int = HEAD_EXAMPLES
) -> HeadFile:
    """Read the head file that a config names, or select heads on the data; choose ``top_k``.

    Args:
        config: names the file, or the criterion.
        data: training data to select on.
        examples: how many of its lines are looked at.

    Raises:
        FileNotFoundError: there is no such head file.
        ValueError: the file is not valid, or the data lacks what the criterion needs.
    """
    if config.heads.file != "auto":
        return read_chosen_heads(config.heads.file, config.heads.top_k)
    criterion = config.heads.head_criterion
    ranked = select_heads(
        load_reader(config.reader, config.lengths, config.run, {}),
        head_examples(data, examples, config.run.seed, labelled=criterion not in WITHOUT_LABELS),
        criterion=criterion,
        seed=config.run.seed,
        data_name=config.data.train_data,
        reader_name=config.reader.model,
    )
    return ranked.choose(config.heads.top_k or min(CHOSEN_HEADS, len(ranked.heads)))


def make_evaluator(evaluation: EvaluationConfig, seed: int) -> RetrievalEvaluator | None:
    """Read the BEIR folder that a config evaluates on, if it names one."""
    if evaluation.eval_data is None:
        return None
    task = read_task(evaluation.eval_data, evaluation.eval_split, evaluation.keep_identical_ids)
    return RetrievalEvaluator(sample_queries(task, evaluation.eval_queries, seed))
