"""Prompt templates, and a tokenizer that merges across their borders."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dream_training.reading.reader import Reader
from helpers.tiny import HEADS, make_decoder

TAGS = """\
{{ bos_token }}{% for document in documents %}
<doc>{{ document }}</doc>
{% endfor %}
Q {{ query }} A{{ target }}{{ eos_token }}"""
CHATML = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def merging_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Merges characters across the borders of words, lines and documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    vocabulary |= {symbol: i + 3 for i, symbol in enumerate(alphabet)}
    merges = [(".", "Ċ"), (".Ċ", "Ċ"), ("Ċ", "Ċ"), (":", "Ġ"), (">", "F"), ("x", "<"), ("ĊĊ", "Ã")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = template
    return fast


def reader_with_prompt(
    prompt, tokenizer: PreTrainedTokenizerFast | None = None, **options
) -> Reader:
    decoder = make_decoder(vocab_size=300)
    return Reader(decoder, tokenizer or merging_tokenizer(), HEADS, prompt=prompt, **options)
