"""Batches for DREAM: the retriever's tokens, and the texts that the reader needs beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dream_training.choices import check_pool
from dream_training.models.texts import DOCUMENT, QUERY, text_features
from dream_training.objectives.pools import Candidates, build_pools, choose_candidates

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DATASET = "dataset_name"  # a column that the trainer adds where there are several data sets
_COLUMNS = "query, target, and documents (a list of texts) or document / positive / negative..."


class DreamCollator:
    """Data collator for :class:`~dream_training.objectives.dream.DreamLoss`.

    A row has the columns ``query`` and ``target``, and its candidate documents either as a list,
    ``documents``, or as one column each (``document``, ``positive``, ``negative``, ``negative_2``,
    ...). Which of them a query competes over is ``pool``:

    - ``"both"``: all candidates of a batch form one pool without repetitions, for every query;
    - ``"in_batch"``: one document of every row forms that pool, the relevant one where it is known
      and the first one elsewhere;
    - ``"mined"``: every query has a pool of its own candidates.

    ``positive`` may also be an integer, the index of the known relevant document in ``documents``
    (-1 for unknown). It is only watched, never trained on.

    Prompts are those that ``encode_query`` and ``encode_document`` of the model use, unless
    ``prompts`` says otherwise, here or in the trainer's arguments. There it may be, as for the
    library's own collator, a text for all columns, or texts by column, by data set, or by both;
    what such texts by name leave out has no prompt.

    Args:
        model: the retriever; its tokenizer, lengths and prompts are used.
        query_max_len: tokens of a query that are encoded; the model's own limit by default.
        passage_max_len: tokens of a document that are encoded; the same.
        prompts: prompt texts of ``"query"`` and ``"document"``.
        pool: ``"both"``, ``"in_batch"`` or ``"mined"``.
        documents_per_query: how many candidates of a row are drawn for a batch, the relevant one
            always among them where it is known; None for all.
        seed: of the draw.

    Raises:
        ValueError: ``pool`` is unknown, or ``documents_per_query`` below 1 or without meaning; of a
            batch, that a column is missing, or the trainer's prompts do not fit.
    """

    # Read by SentenceTransformerTrainer. A label is the same in many rows, which the batch sampler
    # "no_duplicates" would keep apart, one to a batch.
    valid_label_columns: Sequence[str] = ("positive",)
    prompts: dict[str, str] | None = None
    router_mapping: dict[str, str] | None = None

    def __init__(
        self,
        model: SentenceTransformer,
        query_max_len: int | None = None,
        passage_max_len: int | None = None,
        prompts: Mapping[str, str] | None = None,
        pool: str = "both",
        documents_per_query: int | None = None,
        seed: int = 0,
    ) -> None:
        check_pool(pool, documents_per_query)
        self.pool, self.documents_per_query, self.seed = pool, documents_per_query, seed
        self.model = model
        self.max_len = {QUERY: query_max_len, DOCUMENT: passage_max_len}
        self._prompts = prompts

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            return {}
        missing = {"query", "target"} - rows[0].keys()
        if missing:
            raise ValueError(
                f"DreamLoss needs the columns {_COLUMNS}; {', '.join(sorted(missing))} is missing "
                f"from {', '.join(rows[0])}"
            )
        queries = [row["query"] for row in rows]
        candidates = choose_candidates(
            queries, list(map(_candidates, rows)), self.pool, self.documents_per_query, self.seed
        )
        documents, pools, positives = build_pools(candidates, self.pool)
        batch: dict[str, Any] = {}
        prompts = self._batch_prompts(rows[0])
        for name, texts in ((QUERY, queries), (DOCUMENT, documents)):
            limit, prompt = self.max_len[name], prompts.get(name)
            for key, value in text_features(self.model, texts, name, limit, prompt).items():
                batch[f"{name}_{key}"] = value
            batch[f"{name}_texts"] = texts
        batch[f"{QUERY}_targets"] = [row["target"] for row in rows]
        batch[f"{QUERY}_positives"] = positives
        if pools is not None:
            batch[f"{QUERY}_pools"] = pools
        if _DATASET in rows[0]:
            batch[_DATASET] = rows[0][_DATASET]
        return batch

    def _batch_prompts(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The prompt of queries and that of documents, where it is not the model's own."""
        # The trainer tells a collator nothing, and its model's card what it was given.
        given = getattr(self.model.model_card_data, "all_hyperparameters", {}).get("prompts")
        if self._prompts is not None:
            if given:
                raise ValueError(
                    "prompts must be given to the trainer or to DreamCollator, not both"
                )
            return {name: self._prompts.get(name, "") for name in (QUERY, DOCUMENT)}
        if not given:
            return {}
        columns = _document_columns(row)
        by_column = _column_prompts(given, row, columns)
        of_documents = {by_column.get(column, "") for column in columns}
        if len(of_documents) > 1:
            raise ValueError(
                "prompts must be the same for every column of documents, which form one pool, got "
                f"{ {column: by_column.get(column, '') for column in columns} }"
            )
        return {QUERY: by_column.get(QUERY, ""), DOCUMENT: of_documents.pop()}


class LabelledCollator:
    """Data collator for losses of the library over a column ``query`` and columns of documents.

    Args:
        model: the retriever; its tokenizer, lengths and prompts are used.
    """

    # read by SentenceTransformerTrainer
    valid_label_columns: Sequence[str] = ()

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            f"{column}_{key}": value
            for column in (rows[0] if rows else ())
            for key, value in text_features(
                self.model,
                [row[column] for row in rows],
                QUERY if column == QUERY else DOCUMENT,
            ).items()
        }


def _column_prompts(given: Any, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """The prompts of a trainer by column of this row's data set."""
    dataset = row.get(_DATASET)
    if isinstance(given, dict):
        if dataset in given:
            given = given[dataset]
        elif isinstance(next(iter(given.values())), dict):
            if dataset is None:
                raise ValueError(
                    f"prompts names data sets ({', '.join(given)}), and there is only one: give a "
                    "text for all columns, or texts by column"
                )
            given = {}
    if isinstance(given, str):
        return dict.fromkeys((QUERY, *columns), given)
    unknown = given.keys() - {QUERY, *columns}
    # Other data sets may have other columns.
    if unknown and dataset is None:
        raise ValueError(
            f"prompts must be for columns that are embedded, {', '.join((QUERY, *columns))}, got "
            f"{', '.join(sorted(unknown))}"
        )
    return dict(given)


def _document_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold its candidate documents."""
    if "documents" in row:
        return ["documents"]
    columns = [
        name
        for name, value in row.items()
        if name not in ("query", "target", _DATASET) and isinstance(value, str)
    ]
    if not columns:
        raise ValueError(f"DreamLoss needs the columns {_COLUMNS}; got {', '.join(row)}")
    return columns


def _candidates(row: dict[str, Any]) -> Candidates:
    """Return the candidate texts of a row and the index of the known relevant one, or -1."""
    if "documents" in row:
        positive = row.get("positive", -1)
        return list(row["documents"]), -1 if positive is None else int(positive)
    columns = _document_columns(row)
    known = columns.index("positive") if "positive" in columns else -1
    return [row[name] for name in columns], known
