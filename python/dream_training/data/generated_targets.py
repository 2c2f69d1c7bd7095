"""Targets written by a language model, for data with queries and passages but no answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from dream_training.data.training_row import TrainingRow
from dream_training.models.text_tokens import text_tokens, without_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTRUCTION = (
    "Passage:\n{document}\n\nQuestion: {query}\n\n"
    "Answer the question in one short sentence, from the passage alone."
)
_PLAIN = "{instruction}\nAnswer:"


@dataclass
class GenerationCounts:
    """Counts of rows by outcome.

    Attributes:
        kept: rows that had a target already.
        written: rows that got one.
        empty: rows dropped because the model wrote nothing.
    """

    kept: int = 0
    written: int = 0
    empty: int = 0


def write_targets(
    rows: Iterable[TrainingRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: GenerationCounts,
    *,
    instruction: str = INSTRUCTION,
    passage_max_len: int = 256,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: Callable[[GenerationCounts], None] | None = None,
) -> Iterator[TrainingRow]:
    """Yield the rows with a target: their own, or what the model writes from query and positive.

    Generation is greedy regardless of the model's own generation config, so the same rows in the
    same batches give the same targets. The instruction goes through the tokenizer's chat template
    if it has one. Only the first line of an answer that is not blank is kept.

    Args:
        rows: rows; one without a target or an answer needs a known positive.
        model: a transformers decoder.
        tokenizer: its tokenizer.
        counts: updated in place.
        instruction: must contain ``{document}`` and ``{query}``.
        passage_max_len: tokens of the passage shown to the model.
        max_new_tokens: tokens of a target.
        batch_size: rows per generation batch.
        overwrite: replace existing targets too, in rows with a known positive.
        progress: called after every batch.

    Raises:
        ValueError: a row has neither target nor positive, or the instruction lacks a placeholder.
    """
    for part in ("{document}", "{query}"):
        if part not in instruction:
            raise ValueError(f"instruction must contain {part}, got {instruction!r}")
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        todo = [
            index
            for index, row in enumerate(batch)
            if _needs_target(row) or (overwrite and row.positives)
        ]
        prompts = [_prompt(batch[index], instruction, tokenizer, passage_max_len) for index in todo]
        written = dict(zip(todo, _generate(prompts, model, tokenizer, max_new_tokens)))
        for index, row in enumerate(batch):
            if index not in written:
                counts.kept += 1
                yield row
            elif written[index]:
                counts.written += 1
                yield replace(row, target=written[index])
            else:
                counts.empty += 1
        if progress is not None:
            progress(counts)


def _needs_target(row: TrainingRow) -> bool:
    if row.target is not None or row.answers:
        return False
    if not row.positives:
        raise ValueError(
            f"{row.where}: has neither a target nor a known positive to write one from"
        )
    return True


def _prompt(row: TrainingRow, instruction: str, tokenizer: Any, passage_max_len: int) -> str:
    # Special tokens may come from the chat template only.
    document = without_special_tokens(tokenizer, row.documents[row.positives[0]])
    query = without_special_tokens(tokenizer, row.query)
    ids = text_tokens(tokenizer, document, passage_max_len + 1)
    if len(ids) > passage_max_len:
        document = tokenizer.decode(ids[:passage_max_len], skip_special_tokens=True)
    # Not str.format: passages and questions may contain braces.
    around = [part.replace("{query}", query) for part in instruction.split("{document}")]
    text = document.strip().join(around)
    if not getattr(tokenizer, "chat_template", None):
        return _PLAIN.replace("{instruction}", text)
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    )


def _generate(prompts: Sequence[str], model: Any, tokenizer: Any, max_new_tokens: int) -> list[str]:
    if not prompts:
        return []
    import torch

    # A chat template has already added the special tokens.
    special = not getattr(tokenizer, "chat_template", None)
    ids = [tokenizer(prompt, add_special_tokens=special)["input_ids"] for prompt in prompts]
    width = max(map(len, ids))
    # Any token will do for padding: the mask hides it.
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padding = padding or 0
    device = model.get_input_embeddings().weight.device
    # Padding on the left, so that the generated tokens follow the prompt.
    inputs = torch.tensor([[padding] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    with torch.no_grad(), _neutral_generation(model, max_new_tokens, padding) as settings:
        output = model.generate(input_ids=inputs, attention_mask=mask, generation_config=settings)
    answers = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [_first_line(answer) for answer in answers]


@contextmanager
def _neutral_generation(model: Any, max_new_tokens: int, padding: int) -> Iterator[Any]:
    """Settings of plain greedy decoding, with only the special tokens of the model's own.

    Beams, penalties, minimal lengths, forced and suppressed tokens would change the targets.
    transformers fills what a given config leaves unset from the model's, which is replaced here.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        bos_token_id=getattr(own, "bos_token_id", None),
        eos_token_id=getattr(own, "eos_token_id", None),
        pad_token_id=padding,
    )
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = own


def _first_line(answer: str) -> str:
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")
