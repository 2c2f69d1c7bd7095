"""``dream doctor``: whether a run can learn, before it is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dream_kernels import HeadFile
from dream_kernels.injection import WindowError
from dream_training.console import progress
from dream_training.heads.selection import head_examples
from dream_training.preflight import reader_checks, retriever_checks
from dream_training.preflight.check import FAULT, Check
from dream_training.preflight.patient import Patient
from dream_training.preflight.trial import trial

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from dream_training.config import TrainConfig
    from dream_training.heads.selection import HeadExample
    from dream_training.reading.reader import Reader

_ROWS = 256  # lines whose lengths are looked at
_EXAMPLES = 32  # questions that the reader answers
_HEAD_EXAMPLES = 32
_OTHER_HEADS = "name other heads, or heads: auto"
# The documents' keys go through every layer, so that no choice of heads helps.
_WITHIN_WINDOW = (
    "read documents with context: independent and lower reader_passage_max_len until a document "
    "with query and target fits into the window, or take heads: auto, which leaves out layers with "
    "short windows"
)


def diagnose(
    config: TrainConfig,
    *,
    data: Dataset | None = None,
    model: SentenceTransformer | None = None,
    heads: HeadFile | None = None,
    report: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Examine a run: a minute on a CPU with a reader of 135M parameters.

    Heads, losses and spans are those of objective ``dream``; the other objectives are examined
    without them. ``model`` is trained for two steps at the end. With ``taught`` and ``eval_data``
    a short training shows whether the retriever becomes better or worse.

    Args:
        config: the run.
        data: training data; read from ``config.train_data`` by default.
        model: the untrained retriever; built from the config by default.
        heads: the reader's heads; from ``config.heads`` by default, selected on fewer examples
            than a run would take.
        report: called with every check as soon as it is made.

    Returns:
        The checks in order.

    Raises:
        FileNotFoundError: a file of the config is missing.
        ValueError: the config or the data cannot be read; the message says what.
    """
    from dream_training.models.loading import prepared_retriever
    from dream_training.objectives.build import build_objective, check_data
    from dream_training.reading.loading import load_reader
    from dream_training.training.inputs import find_heads, load_training_data
    from dream_training.training.taught import check_taught

    checks: list[Check] = []

    def add(*new: Check) -> None:
        for check in new:
            checks.append(check)
            report(check)

    if data is None:
        # The doctor looks at all lines, also where training streams them.
        data = load_training_data(replace(config.data, streaming=False), config.run.seed)
        check_taught(config)
    model = prepared_retriever(model, config.retriever, config.lengths, config.run)
    try:
        check_data(data, config.optimisation, config.objective)
        if config.objective.name == "infonce":
            build_objective(config, model, data, {})
    except ValueError as error:
        add(Check("batches", FAULT, str(error)))
        return checks
    # Lines of few documents, and those that share a taught pool, fill a batch only if all of them
    # are there.
    needs_all = config.objective.name == "infonce" or config.data.taught is not None
    whole = data if needs_all else None
    rows = max(
        _ROWS, config.optimisation.batch_size * config.optimisation.gradient_accumulation_steps
    )
    data = data.shuffle(seed=config.run.seed).select(range(min(len(data), rows)))
    patient = Patient(config, data, model, training_data=whole)
    if config.objective.name == "dream" and config.needs_reader:
        try:
            heads = find_heads(config, data, _HEAD_EXAMPLES) if heads is None else heads
            chosen = heads.by_layer(config.heads.top_k)
            reader = load_reader(config.reader, config.lengths, config.run, chosen)
            patient = replace(patient, heads=heads, reader=reader)
        except ValueError as error:
            add(Check("heads", FAULT, str(error), _advice(error) or _OTHER_HEADS))
            return checks
    with progress("counting tokens"):
        add(*retriever_checks.truncation(patient))
    if patient.reader is not None:
        # Not those that the heads were selected on, as far as there are others.
        examples = head_examples(data, _EXAMPLES, config.run.seed + 1, labelled=_labelled(data))
        documents = list(dict.fromkeys(d for example in examples for d in example.documents))
        with progress("reading documents"):
            size = config.optimisation.batch_size
            add(reader_checks.spans(patient.reader, documents[:size]))
            add(_of_reader("heads", reader_checks.heads, patient.reader, examples[:size]))
            add(_of_reader("target loss", reader_checks.losses, patient.reader, examples))
        # The steps load their own, and two would count as the run's memory.
        patient = replace(patient, reader=None)
    try:
        with progress("encoding a batch"):
            add(retriever_checks.weights(patient))
    except ValueError as error:
        add(Check("pool", FAULT, str(error)))
        return checks
    try:
        with progress("two steps of training"):
            add(*retriever_checks.steps(patient))
    except ValueError as error:
        add(Check("steps", FAULT, str(error), _advice(error)))
        return checks
    if config.data.taught is not None and config.evaluation.eval_data is not None:
        with progress("a trial"):
            add(trial(patient))
    return checks


def _of_reader(
    name: str,
    examine: Callable[[Reader, Sequence[HeadExample]], Check],
    reader: Reader,
    examples: Sequence[HeadExample],
) -> Check:
    try:
        return examine(reader, examples)
    except ValueError as error:
        return Check(name, FAULT, str(error), _advice(error))


def _advice(error: ValueError) -> str:
    """What to do about an error of the reader; empty where its message is all that is known."""
    return _WITHIN_WINDOW if isinstance(error, WindowError) else ""


def _labelled(data: Dataset) -> bool:
    """Whether enough lines know their positive to look at those alone."""
    return sum(positive >= 0 for positive in data["positive"]) >= 2


def has_fault(checks: Sequence[Check]) -> bool:
    """Whether the run should not be started as it is."""
    return any(check.status == FAULT for check in checks)
