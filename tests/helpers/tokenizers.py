"""Small tokenizers of the kinds that readers have, trained on a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

_TEXT = """\
Documents:\n\nThe capital of France is Paris.\n\nThe river Seine is in Paris, and it is old.\n\
\n\nQuestion: what is the capital of France?\nAnswer: Paris is the capital of France.\n\n"""
# Of Llama 3, which puts a line end to the punctuation before it; Qwen's is much the same.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = ["<s>", "</s>", "<unk>"]


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(regex: str | None = None, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Of GPT-2 and SmolLM2; or with another regex."""
    tokenizer = Tokenizer(models.BPE())
    level = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        level()
        if regex is None
        else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(regex), "isolated"), level(use_regex=False)]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [_TEXT],
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=_NAMES, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _fast(tokenizer)


def sentence_piece(prefix: str | None) -> PreTrainedTokenizerFast:
    """SentencePiece's kind of BPE.

    Args:
        prefix: where a space is put before a text: ``piece``, at its beginning and after every
            special token, as in Llama 2; ``first``, at its beginning; None for nowhere (Gemma).
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*_NAMES, *bytes_], show_progress=False
    )
    trained.train_from_iterator([_TEXT], trainer)
    content = json.loads(trained.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in _NAMES]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "piece":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    else:
        scheme = "never" if prefix is None else prefix
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(parts)
    return _fast(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's other kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=_NAMES, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return _fast(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """Of BERT: words and the pieces inside them, without spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=_NAMES, show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    return _fast(tokenizer)


KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "gpt2-trimmed": partial(byte_level, trim_offsets=True),
    "llama3": partial(byte_level, _LLAMA_3),
    "llama2": partial(sentence_piece, "piece"),
    "llama2-first": partial(sentence_piece, "first"),
    "gemma": partial(sentence_piece, None),
    "unigram": unigram,
    "wordpiece": word_piece,
    # Not one of the library tokenizers: it does not say where its tokens are.
    "slow": ByT5Tokenizer,
}
