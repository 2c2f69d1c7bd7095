"""The doctor's look at the retriever: truncation, weights, gradient, and what steps cost."""

from __future__ import annotations

import io
import math
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback

from dream_training.console import duration
from dream_training.memory import peak_memory, total_memory
from dream_training.models.texts import DOCUMENT, QUERY, encode, prompt_of
from dream_training.objectives.pools import pool_scores
from dream_training.preflight.check import FAULT, OK, WARNING, Check

if TYPE_CHECKING:
    from dream_training.history import History
    from dream_training.preflight.patient import Patient

# Share of a text that is kept, by the middle one of all texts; and share of texts that are cut.
_NOTHING_KEPT, _MANY_CUT = 0.1, 0.5
# Entropy of the weights at the start over that of uniform ones.
_ONE_HOT, _PEAKED, _SENSIBLE = 0.1, 0.3, 0.9
# The most weight that a document can get at all, whatever the retriever learns.
_LEAST_REACH = 0.5
_STEPS = 2
_NAMED_PARTS = 4
_TIMED_TEXTS = 32
_MUCH_MEMORY = 0.9


def truncation(patient: Patient) -> list[Check]:
    """How many queries, passages and targets are cut, by the retriever and by the reader."""
    config, data = patient.config, patient.data
    fields = {
        "queries": (
            list(data["query"]),
            config.lengths.query_max_len,
            prompt_of(patient.model, QUERY),
        ),
        "passages": (
            list(dict.fromkeys(d for documents in data["documents"] for d in documents)),
            config.lengths.passage_max_len,
            prompt_of(patient.model, DOCUMENT),
        ),
        "targets": (list(data["target"]), config.lengths.target_max_len, None),
    }
    checks = []
    for name, (texts, limit, prompt) in fields.items():
        kept = {}
        if prompt is not None:
            tokenizer: Any = patient.model.tokenizer
            # A space between prompt and text belongs to the text's first token.
            around = len(tokenizer(prompt.rstrip(" "))["input_ids"])
            kept["retriever"] = _shares_kept(tokenizer, [prompt + t for t in texts], limit, around)
        if patient.reader is not None:
            kept["reader"] = _shares_kept(patient.reader.tokenizer, texts, limit, 0)
        if kept:
            checks.append(_of_shares(name, kept, limit, len(texts)))
    return checks


def _shares_kept(tokenizer: Any, texts: Sequence[str], limit: int, around: int) -> list[float]:
    """The share of each text's tokens that stays; ``around`` tokens are not the text's own."""
    special = {"add_special_tokens": around > 0}
    lengths = [len(ids) - around for ids in tokenizer(list(texts), **special)["input_ids"]]
    return [min(1.0, max(0, limit - around) / max(1, length)) for length in lengths]


def _of_shares(name: str, kept: dict[str, list[float]], limit: int, count: int) -> Check:
    parts = []
    for who, shares in kept.items():
        cut = sum(share < 1 for share in shares) / len(shares)
        part = f"{cut:.0%} cut by the {who}"
        if cut:
            part += f" (the middle text keeps {statistics.median(shares):.0%})"
        parts.append(part)
    figure = f"{', '.join(parts)}, at {limit} tokens, of {count}"
    key = {"queries": "query_max_len", "passages": "passage_max_len", "targets": "target_max_len"}
    if any(statistics.median(shares) < _NOTHING_KEPT for shares in kept.values()):
        return Check(name, FAULT, figure, f"hardly anything is left: raise {key[name]}")
    if any(sum(s < 1 for s in shares) > _MANY_CUT * len(shares) for shares in kept.values()):
        return Check(name, WARNING, figure, f"raise {key[name]} if what is cut matters")
    return Check(name, OK, figure)


def weights(patient: Patient) -> Check:
    """Whether the untrained retriever's weights are neither one-hot nor flat for ever.

    Raises:
        ValueError: the data has not the candidates that ``config.pool`` needs.
    """
    from dream_training.objectives.build import build_collator

    config = patient.config
    rows = list(patient.data.select(range(config.optimisation.batch_size)))
    batch = build_collator(config, patient.model)(rows)
    similarity = _similarities(patient, batch["query_texts"], batch["document_texts"])
    similarity, _ = pool_scores(similarity, batch.get("query_pools"))
    return of_similarity(similarity, config.objective.temperature)


def of_similarity(similarity: Tensor, temperature: float) -> Check:
    """Judge the weights of cosine similarities ``[B, C]`` at a temperature.

    Behind the end of a pool smaller than ``C`` they are -inf.
    """
    documents = similarity.shape[1]
    if similarity.isfinite().sum(-1).max() < 2:
        figure = "every query of a batch has one document to choose from, so no gradient"
        advice = "raise batch_size, or bring more documents: dream mine"
        return Check("weights", FAULT, figure, advice)
    share = _entropy_share(similarity, temperature)
    sensible = _temperature_for(similarity, _SENSIBLE)
    # A document at cosine 1 and all the others at -1.
    reach = 1 / (1 + (documents - 1) * math.exp(-2 / temperature))
    figure = (
        f"entropy {share:.2f} of that of uniform weights over {documents} documents at "
        f"temperature {temperature:g}, {_SENSIBLE} at {sensible:.2g}"
    )
    higher, lower = f"raise it towards {sensible:.2g}", f"lower it towards {sensible:.2g}"
    if share < _ONE_HOT:
        return Check("weights", FAULT, figure, f"one-hot at the start: {higher}")
    if reach < max(_LEAST_REACH, 2 / documents):
        figure += f"; no document can get more than {reach:.2f} of the weight"
        return Check("weights", FAULT, figure, f"flat whatever is learnt: {lower}")
    if share < _PEAKED:
        return Check("weights", WARNING, figure, f"few documents get any gradient: {higher}")
    return Check("weights", OK, figure)


def _entropy_share(similarity: Tensor, temperature: float) -> float:
    """Mean of the rows' entropies over those of uniform weights, as far as there is a choice."""
    documents = similarity.isfinite().sum(-1)
    several = documents > 1
    if not several.any():
        return 0.0
    weights = torch.softmax(similarity[several].double() / temperature, -1)
    entropy = torch.special.entr(weights).sum(-1)
    return (entropy / documents[several].double().log()).mean().item()


def _temperature_for(similarity: Tensor, share: float) -> float:
    """The temperature at which the entropy has this share of its maximum, by bisection."""
    low, high = math.log(1e-6), math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        if _entropy_share(similarity, math.exp(middle)) < share:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _similarities(patient: Patient, queries: list[str], documents: list[str]) -> Tensor:
    """Cosine similarities ``[B, C]`` float32 on the CPU."""
    from sentence_transformers.util import cos_sim

    options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
    of_queries = encode(patient.model, queries, QUERY, **options)
    of_documents = encode(patient.model, documents, DOCUMENT, **options)
    return cos_sim(of_queries.float(), of_documents.float()).cpu()


class _Gradients(TrainerCallback):
    """Keeps which parameters had a gradient in the last step, and the norm of all before clipping.

    Attributes:
        none: parts of the model, such as ``layer 3 lora_A``, without a gradient in the last step.
        norms: one for each step.
    """

    def __init__(self) -> None:
        self.none: list[str] = []
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.none = list(
            dict.fromkeys(
                part_of(name)
                for name, parameter in kwargs["model"].named_parameters()
                if parameter.requires_grad
                and (parameter.grad is None or not parameter.grad.any().item())
            )
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, for people."""
    layer = re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", name)
    kind = re.search(r"lora_[AB]", name)
    if layer is None:
        return name.removesuffix(".weight").removeprefix("0.")
    return f"layer {layer[1]}" + (f" {kind[0]}" if kind else "")


def steps(patient: Patient) -> list[Check]:
    """Take two real steps: what gradient arrives, and what they cost."""
    trainable = sum(p.numel() for p in patient.model.parameters() if p.requires_grad)
    if trainable == 0:
        advice = "nothing can be learnt: set lora_r, or unfreeze the model"
        return [Check("gradient", FAULT, "no parameter of the retriever is trainable", advice)]
    gradients = _Gradients()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    history = _train(patient, gradients)
    return [_of_gradients(gradients, trainable, history), _of_cost(patient, history)]


def _train(patient: Patient, gradients: _Gradients) -> History:
    from dream_training.training.driver import train

    with tempfile.TemporaryDirectory() as folder:
        config = patient.config.with_changes(
            # From the first step at full rate: adapters that start at 0 pass on no gradient, and
            # a rate that starts at 0 would keep them there.
            warmup_steps=0,
            lr_scheduler="constant",
            max_steps=_STEPS,
            eval_data=None,
            save_steps=0,
            output_dir=folder,
        )
        return train(
            config,
            data=patient.data if patient.training_data is None else patient.training_data,
            heads=patient.heads,
            model=patient.model,
            console=Console(file=io.StringIO()),
            callbacks=[gradients],
        ).history


def _of_gradients(gradients: _Gradients, trainable: int, history: History) -> Check:
    first = gradients.norms[0] if gradients.norms else 0.0
    figure = f"norm {first:.3g} at the first step, {trainable:,} trainable weights"
    if any("skipped" in step for step in history.steps):
        figure = f"not finite in one of {len(history.steps)} steps"
        return Check("gradient", FAULT, figure, "use dtype float32, or a higher temperature")
    if first == 0:
        return Check("gradient", FAULT, figure, "no gradient reaches the retriever")
    if gradients.none:
        names = ", ".join(gradients.none[:_NAMED_PARTS])
        more = len(gradients.none) - _NAMED_PARTS
        return Check(
            "gradient",
            WARNING,
            f"{figure}; none in {names}" + (f" and {more} more parts" if more > 0 else ""),
            "these parts do not learn",
        )
    return Check("gradient", OK, f"{figure}, every part gets some")


def _of_cost(patient: Patient, history: History) -> Check:
    config = patient.config
    step = min(float(entry["seconds"]) for entry in history.steps)
    training = step * config.optimisation.max_steps
    evaluation, evaluations = 0.0, 0
    if config.evaluation.eval_data is not None:
        # at the start, at every eval_steps, and at the end
        evaluations = 1 + -(-config.optimisation.max_steps // config.evaluation.eval_steps)
        evaluation = evaluations * _seconds_of_evaluation(patient)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, total = peak_memory(device), total_memory(device)
    kind = "GPU memory" if device.type == "cuda" else "memory"
    figure = (
        f"{step:.2f} s a step, {duration(training)} for {config.optimisation.max_steps} steps"
        + (f" and {duration(evaluation)} for {evaluations} evaluations" if evaluations else "")
    )
    if not (peak and total):  # not every system tells
        return Check("time and memory", OK, figure)
    figure += f"; {peak / 2**30:.1f} of {total / 2**30:.0f} GiB of {kind} at the most"
    if peak > _MUCH_MEMORY * total:
        advice = (
            "memory is nearly full: lower batch_size or passage_max_len, or quantise the reader"
        )
        return Check("time and memory", WARNING, figure, advice)
    return Check("time and memory", OK, figure)


def _seconds_of_evaluation(patient: Patient) -> float:
    """What one evaluation takes, from the time that some of its documents take."""
    from dream_training.data.beir_folder import read_beir_folder

    config = patient.config
    assert config.evaluation.eval_data is not None
    corpus, queries, _ = read_beir_folder(config.evaluation.eval_data, config.evaluation.eval_split)
    texts = list(corpus.values())[:_TIMED_TEXTS]
    begin = time.perf_counter()
    encode(patient.model, texts, DOCUMENT, show_progress_bar=False)
    each = (time.perf_counter() - begin) / len(texts)
    return each * (
        len(corpus) + len(queries) * config.lengths.query_max_len / config.lengths.passage_max_len
    )
