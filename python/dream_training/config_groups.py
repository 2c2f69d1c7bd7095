"""The keys of a training run, in groups: what most functions of the package are given of a config.

A key has one name in all forms of a config, such as ``batch_size``, except the first one of
``reader``, ``heads``, ``retriever`` and ``objective``: where the keys are not grouped, it has the
name of the group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dream_kernels.parsing import shortened
from dream_training.choices import (
    CONTEXTS,
    DIRECTIONS,
    DTYPES,
    HEAD_CRITERIA,
    INJECTED_ROWS,
    OBJECTIVES,
    POSITIVES,
    READER_SHARDINGS,
    TEACHER_LOSSES,
    TEACHERS,
    TEACHINGS,
    check_choice,
    check_document_store,
    check_engine,
    check_pool,
    check_positive,
    check_quantization,
    check_reader_prompt,
    check_temperature,
)
from dream_training.config_group import FLAT, Group


@dataclass(frozen=True)
class ReaderConfig(Group):
    """The frozen language model, and how it reads.

    Attributes:
        model: folder, GGUF file or hub name; ``smollm2`` for the packaged one; ``none`` where
            nothing is read, the default with ``taught``.
        context: how documents are read, ``independent`` or ``joint``.
        mode: ``reweight`` or ``bias``.
        document_mass: fixes the attention that all documents get together; None keeps the reader's.
        injected_rows: the rows that the scores act on: ``all`` after the documents, or ``target``,
            those that predict the target.
        reader_prompt: the text around documents, query and target: ``plain``; ``chat``, the
            reader's chat template, with the target as its answer; or the path of a Jinja template
            that prints ``documents`` (a list), ``query`` and ``target`` in this order.
        document_store: where keys and values of documents are kept once they are read: ``memory``,
            a folder that later runs may share, or None. Independent reading only.
        document_store_gb: what the store keeps at most, in 10⁹ bytes.
        reader_quantization: how the reader's weights are quantised while it is loaded: ``int8``
            (torchao), ``bnb-8bit`` or ``bnb-4bit`` (bitsandbytes), the keys of one of transformers'
            quantisation configs, ``quant_method`` among them, or None.
        reader_sharding: with several processes, ``replicated``, a whole reader in each; or
            ``sharded``, its layers cut over them and fetched as they run.
    """

    model: str = field(metadata={FLAT: "reader"})
    context: str = "independent"
    mode: str = "reweight"
    document_mass: float | None = None
    injected_rows: str = "all"
    reader_prompt: str = "plain"
    document_store: str | None = None
    document_store_gb: float = 2.0
    reader_quantization: dict | str | None = None
    reader_sharding: str = "replicated"

    def check(self) -> None:
        check_choice("context", self.context, CONTEXTS)
        check_choice("injected_rows", self.injected_rows, INJECTED_ROWS)
        check_choice("reader_sharding", self.reader_sharding, READER_SHARDINGS)
        check_quantization(self.reader_quantization, self.reader_sharding)
        check_reader_prompt(self.reader_prompt)
        check_document_store(self.document_store, self.document_store_gb, self.context)


@dataclass(frozen=True)
class HeadsConfig(Group):
    """The reader's heads that receive the scores.

    Attributes:
        file: head file, or ``auto`` to select heads on the training data first.
        head_criterion: how ``auto`` ranks heads: by ``loss_gradient``, by ``qr_mass`` or
            ``qr_ndcg``, which need known positives, or ``random``.
        top_k: how many of the best heads receive the scores; None for those that the head file
            says were chosen, and for 16 with ``auto``.
    """

    file: str = field(default="auto", metadata={FLAT: "heads"})
    head_criterion: str = "loss_gradient"
    top_k: int | None = None

    def check(self) -> None:
        check_choice("head_criterion", self.head_criterion, HEAD_CRITERIA)
        self.at_least(1, "top_k")


@dataclass(frozen=True)
class RetrieverConfig(Group):
    """The model that is trained.

    Attributes:
        model: folder or hub name of a sentence-transformers model or a language model, or a GGUF
            file of the latter.
        retriever_layers: keep only the first layers of a language model; None for all.
        lora_r: rank of the LoRA adapters; 0 trains every weight, held and saved in float32 where
            ``dtype`` is narrower, while the passes of training compute in bfloat16.
        lora_alpha: scale of the adapters, twice the rank by default.
        query_prompt: put before queries by the retriever; None for the model's own prompt,
            if any, and an empty text for none.
        document_prompt: put before documents, in the same way.
    """

    model: str = field(default="smollm2", metadata={FLAT: "retriever"})
    retriever_layers: int | None = None
    lora_r: int = 32
    lora_alpha: int | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None

    def check(self) -> None:
        self.at_least(0, "lora_r")


@dataclass(frozen=True)
class LengthsConfig(Group):
    """How many tokens of a text are used; longer texts are cut.

    Attributes:
        query_max_len: tokens of a query, for retriever and reader.
        passage_max_len: tokens of a document, for the retriever, and for the reader unless the next
            key says otherwise.
        reader_passage_max_len: tokens of a document that the reader reads; None for
            ``passage_max_len``. What a document says about the target may come long after what it
            is found by.
        target_max_len: tokens of a target that are predicted.
    """

    query_max_len: int = 32
    passage_max_len: int = 128
    reader_passage_max_len: int | None = None
    target_max_len: int = 32

    def check(self) -> None:
        self.at_least(1, "query_max_len", "passage_max_len", "reader_passage_max_len")
        self.at_least(1, "target_max_len")


@dataclass(frozen=True)
class DataConfig(Group):
    """The training data.

    Attributes:
        train_data: file, folder or data set of any form that
            :func:`~dream_training.data.jsonl.iterate_training_rows` reads.
        train_split: of ``train_data``, where it has splits.
        train_positives: of several relevant documents the ``first``, or one row of ``each``.
        target_from: what the target is where lines have none: ``positive``,
            ``positive_sentence``, ``answers``, ``query`` (the reader predicts the question, without
            having seen it) or a file of targets.
        taught: folder of ``dream teach``: train on the verdicts in it, without a reader.
            ``train_data`` and ``reader`` may then be left out; where they are given, they must be
            those of the folder.
        taught_agreeing: leave out lines whose known relevant document is not the one that the
            teacher prefers, with ``taught``.
        streaming: read ``train_data`` while training, shuffled within a buffer, and not at once.
        dataloader_workers: processes that tokenise the next batches; 0 for none.
    """

    train_data: str
    train_split: str = "train"
    train_positives: str = "first"
    target_from: str | None = None
    taught: str | None = None
    taught_agreeing: bool = False
    streaming: bool = False
    dataloader_workers: int = 0

    def check(self) -> None:
        check_choice("train_positives", self.train_positives, POSITIVES)
        if self.taught is None and self.taught_agreeing:
            raise ValueError("taught_agreeing must be false unless taught is given")
        if self.taught is not None and self.streaming:
            raise ValueError("streaming must be false with taught: its lines are read at once")
        self.at_least(0, "dataloader_workers")


@dataclass(frozen=True)
class ObjectiveConfig(Group):
    """What is minimised.

    Attributes:
        name: ``dream``, ``replug``, ``emdr``, ``revela``, or ``infonce``, which needs known
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
        teacher_loss: of distilled ``dream``: ``kl``, the divergence between the softmaxes of
            teacher and retriever; or ``margin``, the squared error of the margins by which the
            document that the teacher prefers is above the others.
        teacher_direction: of both, ``teacher_student`` for KL(teacher || retriever), or
            ``student_teacher``.
    """

    name: str = field(default="dream", metadata={FLAT: "objective"})
    temperature: float = 0.05
    temperature_end: float | None = None
    temperature_schedule: str = "constant"
    learnable_temperature: bool = False
    teaching: str = "distilled"
    teacher: str = "mean_log_probability"
    teacher_temperature: float | None = None
    teacher_loss: str = "kl"
    teacher_direction: str = "teacher_student"

    def check(self) -> None:
        check_choice("objective", self.name, OBJECTIVES)
        check_choice("teaching", self.teaching, TEACHINGS)
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("teacher_loss", self.teacher_loss, TEACHER_LOSSES)
        check_choice("teacher_direction", self.teacher_direction, DIRECTIONS)
        if self.teacher_temperature is not None:
            check_positive("teacher_temperature", self.teacher_temperature)
        check_temperature(
            self.temperature,
            self.temperature_end,
            self.temperature_schedule,
            self.learnable_temperature,
        )


@dataclass(frozen=True)
class PoolsConfig(Group):
    """The documents that a query competes over.

    Attributes:
        pool: ``both``, all candidates of the batch; ``in_batch``, one document of each query of
            the batch; ``mined``, the query's own candidates.
        documents_per_query: candidates of a query that are drawn for a step, the relevant one
            always among them where it is known; None for all.
        gather_across_devices: with several processes, let a query compete over the documents of
            all of them, each embedded and read once; else over those of its own process. Not with
            pool ``mined``.
    """

    pool: str = "both"
    documents_per_query: int | None = None
    gather_across_devices: bool = False

    def check(self) -> None:
        check_pool(self.pool, self.documents_per_query)
        if self.gather_across_devices and self.pool == "mined":
            raise ValueError(
                "gather_across_devices must be false with pool 'mined': each query has its own "
                "candidates, and would get no other"
            )


@dataclass(frozen=True)
class OptimisationConfig(Group):
    """Batches, steps and rates.

    Attributes:
        batch_size: queries of a batch; with several processes, of each.
        gradient_accumulation_steps: batches, each with a pool of its own, whose gradients make one
            step, weighted by what they predict.
        mini_batch_size: texts that the retriever embeds at once, so that large pools fit into
            memory; None for all of a batch. Costs one more forward pass. Changes no result but for
            rounding, and in a retriever with dropout the masks that are drawn.
        learning_rate: peak learning rate.
        lr_scheduler: as in transformers: ``linear``, ``cosine``, ``constant_with_warmup``, ...
        warmup_steps: steps until the peak.
        max_grad_norm: gradients are clipped to this norm.
        max_steps: training steps.
        trained_share: of what was learned, what evaluated and saved models keep: their weights are
            ``trained_share`` of the trained and the rest of the initial ones. A trained retriever
            that is adapted forgets less with 0.5; not with ``fsdp`` or ``deepspeed``.
        max_skipped_steps: steps whose loss or gradient is not finite are skipped; more of them than
            this end the run.
    """

    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mini_batch_size: int | None = None
    learning_rate: float = 3e-4
    lr_scheduler: str = "linear"
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    max_steps: int = 100
    trained_share: float = 1.0
    max_skipped_steps: int = 10

    def check(self) -> None:
        self.at_least(2, "batch_size")
        self.at_least(1, "gradient_accumulation_steps", "mini_batch_size", "max_steps")
        self.at_least(0, "warmup_steps", "max_skipped_steps")
        if not 0 < self.trained_share <= 1:
            raise ValueError(
                f"trained_share must be above 0 and at most 1, got {self.trained_share}"
            )


@dataclass(frozen=True)
class EvaluationConfig(Group):
    """Evaluation during and after training.

    Attributes:
        eval_data: BEIR folder, or None.
        eval_split: split of the BEIR folder.
        eval_queries: evaluate on this many of its queries during training, drawn by the seed; the
            corpus stays whole. None for all.
        keep_identical_ids: evaluate with the document that has a query's id ranked for that query
            too; by default only where it is relevant, as a query may be a document itself.
        eval_steps: steps between evaluations; each keeps the best model.
        final_tasks: tasks that the best model is evaluated on after training, as ``dream evaluate``
            names them; the scores of every query go to evaluation.json.
    """

    eval_data: str | None = None
    eval_split: str = "test"
    eval_queries: int | None = None
    keep_identical_ids: bool = False
    eval_steps: int = 50
    final_tasks: list | None = None

    def check(self) -> None:
        self.at_least(1, "eval_queries", "eval_steps")


@dataclass(frozen=True)
class DistributionConfig(Group):
    """The engine that trains in several processes.

    Attributes:
        fsdp: shard the retriever with FSDP2; its gradients alone are shared where no engine is
            chosen (DDP).
        fsdp_config: settings of FSDP2, or a JSON file of them, as the trainer's ``fsdp_config``.
        deepspeed: configuration of DeepSpeed, or a JSON file of it, as the trainer's ``deepspeed``;
            its ``zero_optimization.stage`` chooses ZeRO-2 or ZeRO-3.
        distributed_timeout: seconds that a process waits for the others before the run fails.
    """

    fsdp: bool = False
    fsdp_config: dict | str | None = None
    deepspeed: dict | str | None = None
    distributed_timeout: float = 600.0

    def check(self) -> None:
        check_engine(self.fsdp, self.fsdp_config, self.deepspeed)
        check_positive("distributed_timeout", self.distributed_timeout)


@dataclass(frozen=True)
class OutputConfig(Group):
    """What a run writes and prints.

    Attributes:
        output_dir: where models, metrics and plots go.
        save_steps: steps between checkpoints, from which ``dream train --resume`` continues; None
            for ``eval_steps``, 0 for no checkpoints.
        keep_checkpoints: how many checkpoints are kept.
        log_steps: steps between printed lines where there is no terminal.
        report_queries: training queries whose weights before and after are kept for
            ``dream report``; 0 for none.
    """

    output_dir: str = "runs/train"
    save_steps: int | None = None
    keep_checkpoints: int = 2
    log_steps: int = 10
    report_queries: int = 8

    def check(self) -> None:
        self.at_least(1, "keep_checkpoints", "log_steps")
        self.at_least(0, "save_steps", "report_queries")


@dataclass(frozen=True)
class RunConfig(Group):
    """How models are loaded, and what is random.

    Attributes:
        seed: of weights, data order and head selection.
        dtype: of reader and backbone weights, ``auto`` as stored. What is trained is float32 at
            least.
        device: ``cpu``, ``cuda``, ...; None for a GPU where there is one, and with several
            processes for one each.
        trust_remote_code: run code that comes with a model.
    """

    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if self.device is not None and not re.fullmatch(r"[a-z]{1,20}(:\d{1,2})?", self.device):
            raise ValueError(
                f"device must be written cpu, cuda, cuda:1, ..., got {shortened(self.device)}"
            )
