"""The doctor's look at the reader: spans, heads, and what the loss can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dream_kernels.injection.support import backbone_of
from dream_training.heads.contrast import Contrast, measure_contrast, single_document_losses
from dream_training.heads.selection import HeadExample
from dream_training.preflight.check import FAULT, OK, WARNING, Check
from dream_training.reading.reader import Reader

# Mean share of attention that the documents get in the chosen heads. The gradient scales with it.
_NO_MASS, _LITTLE_MASS = 0.001, 0.05
# Nats per token between documents: below it everything reads the same.
_NO_GAP = 0.005
_STANDARD_ERRORS = 2.0
# With unknown positives every document is tried alone: this many queries and documents.
_SINGLE_QUERIES, _SINGLE_DOCUMENTS = 4, 12
_SHOWN = 40


@torch.no_grad()
def spans(reader: Reader, documents: Sequence[str]) -> Check:
    """Whether the token ranges of a pool decode to the beginnings of its documents."""
    seen: list[Any] = []
    handle = backbone_of(reader.model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].cpu()), with_kwargs=True
    )
    try:
        prefix = reader.read(documents)
    finally:
        handle.remove()
    ranges = prefix.spans[0].tolist()
    if reader.context == "joint":
        tokens = [seen[0][0, start:end] for start, end in ranges]
    else:
        # Every document is a row of its own, after the header that the prefix holds once.
        begin = ranges[0][0]
        rows = [row for batch in seen for row in batch]
        tokens = [row[begin : begin + end - start] for row, (start, end) in zip(rows, ranges)]
    before, after = reader.tokens.prompt.document.split("{document}")
    wrong = []
    for place, (own, document) in enumerate(zip(tokens, documents)):
        text = _squeeze(str(reader.tokenizer.decode(own, clean_up_tokenization_spaces=False)))
        text = text.removeprefix(_squeeze(before)).removesuffix(_squeeze(after))
        # A cut may fall into a character of several tokens.
        if not text.rstrip("\ufffd") or not _squeeze(document).startswith(text.rstrip("\ufffd")):
            wrong.append((place, text))
    if wrong:
        place, text = wrong[0]
        return Check(
            "spans",
            FAULT,
            f"{len(wrong)} of {len(documents)} documents do not decode to their text: number "
            f"{place} is {_short(documents[place])!r} and reads {_short(text)!r}",
            "the reader's tokenizer changes the text: choose another reader, or clean the text",
        )
    return Check("spans", OK, f"{len(documents)} of {len(documents)} decode to their documents")


@torch.no_grad()
def heads(reader: Reader, examples: Sequence[HeadExample]) -> Check:
    """Whether the chosen heads look at the documents at all."""
    documents = list(dict.fromkeys(d for example in examples for d in example.documents))
    prefix = reader.read(documents)
    ids, mask, rows = reader.suffix_rows(
        [example.query for example in examples], [example.target for example in examples]
    )
    mass = reader.injection.read_mass(
        rows, input_ids=ids, attention_mask=mask, document_prefix=prefix
    )
    chosen = torch.cat(
        [mass[layer][:, own].sum(-1).mean(0) for layer, own in reader.injection.heads.items()]
    )
    mean = chosen.mean().item()
    figure = (
        f"{len(chosen)} heads in {len(reader.injection.heads)} layers give the documents "
        f"{mean:.1%} of their attention, {chosen.min():.1%} to {chosen.max():.1%} each"
    )
    advice = "choose other heads (dream heads --compare), or fix document_mass"
    if mean < _NO_MASS:
        return Check("heads", FAULT, figure, advice)
    if mean < _LITTLE_MASS:
        return Check("heads", WARNING, figure, advice)
    return Check("heads", OK, figure)


def losses(reader: Reader, examples: Sequence[HeadExample]) -> Check:
    """Whether the loss depends on which document is read."""
    known = [example for example in examples if example.positive >= 0]
    if len({example.gold for example in known}) >= 2:
        return of_contrast(measure_contrast(reader, known))
    some = examples[:_SINGLE_QUERIES]
    documents = list(dict.fromkeys(d for example in examples for d in example.documents))
    documents = documents[:_SINGLE_DOCUMENTS]
    alone = single_document_losses(
        reader, [example.query for example in some], [example.target for example in some], documents
    )
    best, worst = alone.min(1).values.mean().item(), alone.max(1).values.mean().item()
    figure = (
        f"no positives known; {best:.3f} with the best and {worst:.3f} with the worst of "
        f"{len(documents)} documents alone"
    )
    if worst - best < _NO_GAP:
        return Check("target loss", FAULT, figure, _NO_EFFECT)
    return Check("target loss", OK, figure)


_NO_EFFECT = (
    "what is read makes no difference: choose other heads (dream heads --compare), targets that "
    "the documents help to predict, or a larger reader"
)


def of_contrast(contrast: Contrast) -> Check:
    """Judge the losses with all weight on the right document, uniform, and on a wrong one."""
    means = contrast.means()
    gap, error = contrast.gap()
    gain, gain_error = contrast.gain()
    figure = (
        f"{means['right']:.3f} with all weight on the right document, {means['uniform']:.3f} "
        f"uniform, {means['wrong']:.3f} on a wrong one, {means['plain']:.3f} without scores; wrong "
        f"- right {gap:.3f} ± {error:.3f} over {len(contrast.right)} queries"
    )
    if gap < _NO_GAP or gap < _STANDARD_ERRORS * error:
        return Check("target loss", FAULT, figure, _NO_EFFECT)
    if gain < _STANDARD_ERRORS * gain_error:
        return Check(
            "target loss",
            WARNING,
            figure,
            "the right document is hardly better than all of them: choose other heads "
            "(dream heads --compare)",
        )
    return Check("target loss", OK, figure)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
