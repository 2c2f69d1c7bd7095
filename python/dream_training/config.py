"""The configuration of a training run: a YAML file, any key of which the command line can set."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dream_kernels.parsing import parse_yaml, read_text, shortened, why_not_name
from dream_training.choices import (
    CONTEXTS,
    DIRECTIONS,
    DTYPES,
    HEAD_CRITERIA,
    INJECTED_ROWS,
    OBJECTIVES,
    POSITIVES,
    READER_SHARDINGS,
    TEACHERS,
    TEACHINGS,
    check_at_least,
    check_choice,
    check_document_store,
    check_engine,
    check_pool,
    check_positive,
    check_reader_prompt,
    check_temperature,
)

# Of whole numbers: what torch and the trainer can count to.
_LARGEST = 2**53


@dataclass
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        reader: folder or hub name of the frozen language model; ``smollm2`` for the packaged one.
        heads: head file, or ``auto`` to select heads on the training data first.
        head_criterion: what ``auto`` goes by: ``loss_gradient``, ``qr_mass`` or ``qr_ndcg``, which
            need known positives, or ``random``.
        top_k: how many of the best heads receive the scores; None for those that the head file
            says were chosen, and for 16 with ``heads: auto``.
        context: how documents are read, ``independent`` or ``joint``.
        mode: ``reweight`` or ``bias``.
        document_mass: fixes the attention that all documents get together; None keeps the reader's.
        injected_rows: the rows that the scores act on: ``all`` after the documents, or ``target``,
            those that predict the target.
        reader_prompt: the text around documents, query and target: ``plain``; ``chat``, the
            reader's chat template, with the target as its answer; or the path of a Jinja template
            that prints ``documents`` (a list), ``query`` and ``target`` in this order.
        document_store: where keys and values of documents stay once they are read: ``memory``, a
            folder that later runs may share, or None. Independent reading only.
        document_store_gb: what the store keeps at most, in 10⁹ bytes.
        retriever: folder or hub name of a sentence-transformers model or a language model.
        retriever_layers: keep only the first layers of a language model; None for all.
        lora_r: rank of the LoRA adapters; 0 trains every weight, held and saved in float32 where
            ``dtype`` is narrower, while the passes of training compute in bfloat16.
        lora_alpha: scale of the adapters, twice the rank by default.
        train_data: file, folder or data set of any form that
            :func:`~dream_training.data.jsonl.iterate_training_rows` reads.
        train_split: of ``train_data``, where it has splits.
        train_positives: of several relevant documents the ``first``, or one row of ``each``.
        target_from: what the target is where lines have none: ``positive``,
            ``positive_sentence``, ``answers`` or a file of targets.
        streaming: read ``train_data`` while training, shuffled within a buffer, and not at once.
        eval_data: BEIR folder, or None.
        eval_split: split of the BEIR folder.
        eval_queries: evaluate on this many of its queries during training, drawn by the seed; the
            corpus stays whole. None for all.
        keep_identical_ids: evaluate with the document that has a query's id ranked for that query
            too; by default only where it is relevant, as a query may be a document itself.
        final_tasks: tasks that the best model is evaluated on after training, as ``dream evaluate``
            names them; the scores of every query go to evaluation.json.
        report_queries: training queries whose weights before and after are kept for
            ``dream report``; 0 for none.
        objective: ``dream``, ``replug``, ``emdr``, ``revela``, or ``infonce``, which needs known
            positives.
        temperature: divides the cosine similarities.
        temperature_end: where a schedule leads, from ``temperature`` at the first step.
        temperature_schedule: ``constant``, ``linear``, ``cosine`` or ``exponential``.
        learnable_temperature: learn the temperature, from ``temperature`` on.
        teaching: of ``dream``, how the reader's loss reaches the retriever: ``distilled``, see
            :class:`~dream_training.objectives.distilled_dream.DistilledDreamLoss`; or ``direct``,
            its own gradient in the scores, as in the paper.
        teacher: of ``replug``, ``mean_log_probability`` or ``probability`` of the target.
        teacher_temperature: of ``replug`` and of distilled ``dream``, divides the teacher's scores;
            None for 0.1 nats per target token and 3 nats per target.
        teacher_direction: of both, ``teacher_student`` for KL(teacher || retriever), or
            ``student_teacher``.
        pool: what a query competes over: ``both``, all candidates of the batch; ``in_batch``, one
            document of each query of the batch; ``mined``, its own candidates.
        documents_per_query: candidates of a query that are drawn for a step, the relevant one
            always among them where it is known; None for all.
        batch_size: queries of a batch; with several processes, of each.
        gradient_accumulation_steps: batches, each with a pool of its own, whose gradients make one
            step, weighted by what they predict.
        mini_batch_size: texts that the retriever embeds at once, so that large pools fit into
            memory; None for all of a batch. Costs one more forward pass. Changes no result but for
            rounding, and in a retriever with dropout the masks that are drawn.
        query_max_len: tokens of a query, for retriever and reader.
        passage_max_len: tokens of a document, for the retriever, and for the reader unless the next
            key says otherwise.
        reader_passage_max_len: tokens of a document that the reader reads; None for
            ``passage_max_len``. What a document tells about the target may stand far behind what
            it is found by.
        target_max_len: tokens of a target that are predicted.
        query_prompt: put before queries by the retriever; None for the prompt that the model
            brings along, if any, and an empty text for none.
        document_prompt: put before documents, in the same way.
        learning_rate: peak learning rate.
        lr_scheduler: as in transformers: ``linear``, ``cosine``, ``constant_with_warmup``, ...
        warmup_steps: steps until the peak.
        max_grad_norm: gradients are clipped to this norm.
        max_steps: training steps.
        eval_steps: steps between evaluations; each keeps the best model.
        save_steps: steps between checkpoints, which ``dream train --resume`` goes on from; None
            for ``eval_steps``, 0 for no checkpoints.
        keep_checkpoints: how many checkpoints stay.
        max_skipped_steps: steps whose loss or gradient is not finite are skipped; more of them than
            this end the run.
        dataloader_workers: processes that tokenise the next batches; 0 for none.
        log_steps: steps between printed lines where there is no terminal.
        seed: of weights, data order and head selection.
        dtype: of reader and backbone weights, ``auto`` as stored. What is trained is float32 at
            least.
        device: ``cpu``, ``cuda``, ...; None for a GPU where there is one, and with several
            processes for one each.
        gather_across_devices: with several processes, let a query compete over the documents of
            all of them, each embedded and read once; else over those of its own process. Not with
            pool ``mined``.
        reader_sharding: with several processes, ``replicated``, a whole reader in each; or
            ``sharded``, its layers cut over them and fetched as they run.
        fsdp: with several processes, shard the retriever with FSDP2; its gradients alone are
            shared where no engine is chosen (DDP).
        fsdp_config: settings of FSDP2, or a JSON file of them, as the trainer's ``fsdp_config``.
        deepspeed: configuration of DeepSpeed, or a JSON file of it, as the trainer's ``deepspeed``;
            its ``zero_optimization.stage`` chooses ZeRO-2 or ZeRO-3.
        distributed_timeout: seconds that a process waits for the others before the run fails.
        output_dir: where models, metrics and plots go.
        trust_remote_code: run code that comes with a model.
    """

    reader: str
    train_data: str
    heads: str = "auto"
    head_criterion: str = "loss_gradient"
    top_k: int | None = None
    context: str = "independent"
    mode: str = "reweight"
    document_mass: float | None = None
    injected_rows: str = "all"
    reader_prompt: str = "plain"
    document_store: str | None = None
    document_store_gb: float = 2.0
    retriever: str = "smollm2"
    retriever_layers: int | None = None
    lora_r: int = 32
    lora_alpha: int | None = None
    train_split: str = "train"
    train_positives: str = "first"
    target_from: str | None = None
    streaming: bool = False
    eval_data: str | None = None
    eval_split: str = "test"
    eval_queries: int | None = None
    keep_identical_ids: bool = False
    final_tasks: list | None = None
    report_queries: int = 8
    objective: str = "dream"
    temperature: float = 0.05
    temperature_end: float | None = None
    temperature_schedule: str = "constant"
    learnable_temperature: bool = False
    teaching: str = "distilled"
    teacher: str = "mean_log_probability"
    teacher_temperature: float | None = None
    teacher_direction: str = "teacher_student"
    pool: str = "both"
    documents_per_query: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mini_batch_size: int | None = None
    query_max_len: int = 32
    passage_max_len: int = 128
    reader_passage_max_len: int | None = None
    target_max_len: int = 32
    query_prompt: str | None = None
    document_prompt: str | None = None
    learning_rate: float = 3e-4
    lr_scheduler: str = "linear"
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    max_steps: int = 100
    eval_steps: int = 50
    save_steps: int | None = None
    keep_checkpoints: int = 2
    max_skipped_steps: int = 10
    dataloader_workers: int = 0
    log_steps: int = 10
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    gather_across_devices: bool = False
    reader_sharding: str = "replicated"
    fsdp: bool = False
    fsdp_config: dict | str | None = None
    deepspeed: dict | str | None = None
    distributed_timeout: float = 600.0
    output_dir: str = "runs/train"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(type(self)).items():
            setattr(self, name, _coerce(name, annotation, getattr(self, name)))
        for name, choices in (
            ("head_criterion", HEAD_CRITERIA),
            ("objective", OBJECTIVES),
            ("context", CONTEXTS),
            ("injected_rows", INJECTED_ROWS),
            ("teaching", TEACHINGS),
            ("teacher", TEACHERS),
            ("teacher_direction", DIRECTIONS),
            ("train_positives", POSITIVES),
            ("dtype", DTYPES),
            ("reader_sharding", READER_SHARDINGS),
        ):
            check_choice(name, getattr(self, name), choices)
        if self.device is not None and not re.fullmatch(r"[a-z]{1,20}(:\d{1,2})?", self.device):
            raise ValueError(
                f"device must be written cpu, cuda, cuda:1, ..., got {shortened(self.device)}"
            )
        if self.streaming and self.objective == "infonce":
            raise ValueError("objective 'infonce' needs all lines at once: set streaming: false")
        check_temperature(
            self.temperature,
            self.temperature_end,
            self.temperature_schedule,
            self.learnable_temperature,
        )
        if self.teacher_temperature is not None:
            check_positive("teacher_temperature", self.teacher_temperature)
        check_reader_prompt(self.reader_prompt)
        check_pool(self.pool, self.documents_per_query)
        if self.gather_across_devices and self.pool == "mined":
            raise ValueError(
                "gather_across_devices must be false with pool 'mined': each query has its own "
                "candidates, and would get no other"
            )
        check_engine(self.fsdp, self.fsdp_config, self.deepspeed)
        check_positive("distributed_timeout", self.distributed_timeout)
        check_document_store(self.document_store, self.document_store_gb, self.context)
        for least, names in (
            (2, ("batch_size",)),
            (1, ("query_max_len", "passage_max_len", "target_max_len", "reader_passage_max_len")),
            (1, ("gradient_accumulation_steps", "max_steps", "eval_steps", "log_steps")),
            (1, ("keep_checkpoints", "top_k", "mini_batch_size", "eval_queries")),
            (0, ("save_steps", "lora_r", "warmup_steps", "report_queries")),
            (0, ("max_skipped_steps", "dataloader_workers")),
        ):
            for name in names:
                check_at_least(name, getattr(self, name), least)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML config; ``overrides`` are ``key=value`` and win.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown (the nearest one is suggested), a required one is missing, or
            a value does not fit.
    """
    values = read_yaml(path)
    for key in values:
        check_key(key, str(path))
    return make_config({**values, **parse_overrides(overrides)}, str(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or holds something else.
    """
    values = parse_yaml(read_text(path), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys and values, got {type(values).__name__}")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into config values; a value is read as YAML."""
    values = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"an override must be written key=value, got {shortened(override)}")
        key = key.lstrip("-").replace("-", "_")
        check_key(key, "command line")
        values[key] = parse_yaml(value, f"command line: {key}")
    return values


def make_config(values: dict[str, Any], source: str) -> TrainConfig:
    """Build the config from values whose keys are known."""
    required = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if required:
        raise ValueError(f"{source}: missing key {', '.join(required)}")
    return TrainConfig(**values)


def check_key(key: object, source: str) -> None:
    """Raise ``ValueError`` for a key that no config has, with the nearest one that it has."""
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{source}: unknown key {shortened(key)}{hint}")


def _coerce(name: str, annotation: Any, value: Any) -> Any:
    """Check ``value`` against the field's type; whole numbers and "1e-4" become floats."""
    allowed = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    if value is None and type(None) in allowed:
        return None
    if float in allowed and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}")
            return number
    for kind in allowed:
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            if kind is int and abs(value) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, got {shortened(value)}")
            if kind is str:
                reason = why_not_name(value)
                if reason is not None:
                    raise ValueError(f"{name} must be text, and {reason}: {shortened(value)}")
            return value
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ValueError(f"{name} must be {names}, got {shortened(value)}")
