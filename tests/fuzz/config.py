"""Configs and what the command line sets."""

from __future__ import annotations

from fuzz import scratch
from fuzz.driver import Draws, instrumented, main, refused

_CONFIG = ("dream_training.config", "dream_training.config_group")
with instrumented(*_CONFIG, "dream_kernels.parsing", "yaml"):
    from dream_training.config import TrainConfig, load_config

NAMES = tuple(TrainConfig(reader="r", train_data="t").flat())
SEEDS = [
    b"\0reader: smollm2\ntrain_data: a.jsonl\ntemperature: 1e-2\ntop_k: null\n",
    b"\0reader: r\ntrain_data: t\nfinal_tasks: [a, b]\nlearning_rate: .inf\nbatch_size: 2\n",
    b"\0reader: r\ntrain_data: t\ndocument_store: memory\ndocument_store_gb: 1\ndevice: cuda:1\n",
    b"\0reader: {model: r, context: joint}\ndata: {train_data: t}\n",
    b"\1reader.context=joint",
    b"\1optimisation={batch_size: 4}",
    b"\1learning_rate=1e-3",
    b"\1dtype=bfloat16",
    b"\1final-tasks=[x, [y]]",
    b"\1reader_prompt=chat",
    b"\0a: &a {reader: r}\n<<: *a\n",
]


def check(data: bytes) -> None:
    """Raise if a config is neither made nor refused by its file or by one of its keys."""
    draws = Draws(data)
    on_command_line = draws.below(2)
    text, overrides = draws.rest(), []
    if on_command_line:
        # As Python passes arguments that are not UTF-8.
        overrides = [text.decode("utf-8", "surrogateescape")]
        text = b"reader: r\ntrain_data: t\n"
    path = scratch.write("config.yaml", text)
    names = (str(path), "command line", "override", *NAMES)
    refused(lambda: load_config(path, overrides), *names)


if __name__ == "__main__":
    main(check, SEEDS)
