"""Templates of the reader's prompt."""

from __future__ import annotations

from fuzz.driver import instrumented, main, refused

with instrumented("dream_training.reading.prompts", "jinja2"):
    from dream_training.reading import prompts

_LOOP = b"{% for d in documents %}<doc>{{ d }}</doc>\n{% endfor %}"
SEEDS = [
    b"Documents:\n" + _LOOP + b"Q {{ query }} A {{ target }}",
    b"{{ bos_token }}"
    + _LOOP
    + b"{% set q = query %}{{ q }}{% if target %} {{ target }}{% endif %}",
    b"{% macro m(x) %}[{{ x }}]{% endmacro %}{% for d in documents %}{{ m(d) }}{% endfor %}"
    b"{{ query }}{{ target }}",
    b"{{ documents | join('-') }}{{ query | trim }}{{ 2 * 3 }}{{ '%s' % target }}{{ range(3) }}",
    b"{{ documents.__class__ }}{{ ''.format }}{{ 9 ** 9 }}{{ cycler(1).next() }}{{ lipsum(1) }}",
]


class _Tokenizer:
    bos_token, eos_token = "<s>", "</s>"


def check(data: bytes) -> None:
    """Raise if a template is neither refused by its name nor cut into the pieces of a prompt."""
    text = data.decode("utf-8", "replace")
    made = []
    if refused(lambda: made.append(prompts.template_prompt(text, _Tokenizer())), "reader_prompt"):
        return
    (prompt,) = made
    whole = prompt.header + prompt.document + prompt.query + prompt.target
    assert whole.count("{document}") >= 1 and whole.count("{query}") >= 1


if __name__ == "__main__":
    prompts._SECONDS = 2.0
    main(check, SEEDS)
