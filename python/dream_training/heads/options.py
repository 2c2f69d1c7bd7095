"""How heads are selected, and with which examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dream_training.config_groups import LengthsConfig, ReaderConfig, RunConfig
from dream_training.data.jsonl import read_training_data
from dream_training.reading.loading import load_reader

if TYPE_CHECKING:
    from datasets import Dataset

    from dream_training.reading.reader import Reader


@dataclass(frozen=True)
class HeadOptions:
    """The options of ``dream heads``; its help describes them."""

    reader: str
    data: str
    top_k: int
    examples: int
    pool_size: int
    context: str
    passage_max_len: int
    null_query: str
    token_filter: bool
    point: str
    seed: int
    split: str = "train"
    target_from: str | None = None
    trust_remote_code: bool = False

    def read(self) -> Dataset:
        """The training data."""
        return read_training_data(self.data, split=self.split, target_from=self.target_from)

    def load_reader(self) -> Reader:
        """The reader, with no heads yet."""
        return load_reader(
            ReaderConfig(model=self.reader, context=self.context),
            LengthsConfig(passage_max_len=self.passage_max_len),
            RunConfig(seed=self.seed, trust_remote_code=self.trust_remote_code),
            {},
        )

    def selection(self) -> dict[str, Any]:
        """The arguments of :func:`select_heads`."""
        return {
            "pool_size": self.pool_size,
            "null_query": self.null_query,
            "token_filter": self.token_filter,
            "point": self.point,
            "data_name": self._data_name(),
            "reader_name": self.reader,
        }

    def _data_name(self) -> str:
        """The data with split and targets, since others give other heads."""
        name = self.data
        if self.split != "train":
            name += f", split {self.split}"
        if self.target_from is not None:
            name += f", target_from {self.target_from}"
        return name
