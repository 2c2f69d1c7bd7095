"""What every command prints at 80 columns without a terminal, against ``golden/*.txt``.

After an intended change, ``DREAM_WRITE_GOLDEN=1`` in the environment makes this test rewrite the
files; review the difference before committing it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dream_training import console
from dream_training.cli import app
from dream_training.models.texts import library_keeps_lengths
from helpers.tiny import make_rows, save_decoder, write_tiny_data

pytestmark = pytest.mark.long

GOLDEN = Path(__file__).parent / "golden"
MODEL = {
    "reader": "tiny",
    "retriever": "tiny",
    "retriever_layers": 2,
    "lora_r": 4,
    "top_k": 4,
    "train_data": "train.jsonl",
    "eval_data": "beir",
    "batch_size": 4,
    "query_max_len": 32,
    "passage_max_len": 48,
    "target_max_len": 24,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "eval_steps": 2,
    "log_steps": 2,
    "device": "cpu",
}
LONG = "a-folder-with-a-name-that-is-long [and has brackets]"
# In this order: some need the output of earlier ones.
COMMANDS = {
    "train": "train c.yaml output_dir=run",
    "train-infonce": "train c.yaml objective=infonce output_dir=infonce",
    "train-dry-run": "train c.yaml --dry-run",
    "evaluate": "evaluate run/last infonce/last beir --output evaluation.json",
    "evaluate-long-names": ["evaluate", "run/last", LONG, "beir"],
    "compare-runs": "compare-runs evaluation.json evaluation.json --first-model run/last "
    "--second-model infonce/last",
    "compare": "compare comparison.yaml",
    "heads": "heads --reader tiny --data train.jsonl --top-k 3 --pool-size 4",
    "heads-compare": "heads --reader tiny --data train.jsonl --top-k 3 --pool-size 4 --draws 2 "
    "--compare --examples 12",
    "doctor": "doctor c.yaml",
    "mine": "mine train.jsonl --output mined.jsonl --per-query 2",
    "data-prepare": "data prepare train.jsonl --output prepared.jsonl",
    "data-stats": "data stats train.jsonl --reader tiny --retriever tiny",
    "data-targets": "data targets untold.jsonl --reader tiny --output told.jsonl --device cpu "
    "--max-new-tokens 4",
    "report": "report run infonce --output report.html",
    "teach": "teach c.yaml --output taught --shard 0/2 --lines-per-file 12",
    "data-stats-taught": "data stats taught",
}
VOLATILE = (
    # Measured figures vary in length, and so does where their lines break.
    (r"(?s)(time and memory +|time here +|on an H100 +).*?(?=\n {0,2}\S|\n\n|\Z)", r"\1..."),
    (r"[\d,.]+ tokens/s", "# tokens/s"),
    (r"[\d,.]+ KiB", "# KiB"),
    (r"\b\d+/\d+/\d+\b", "#/#/#"),
    (r"\b\d-\d\b", "#-#"),
    # Which model is best does not matter to the layout.
    (r"  \(best so far\)", ""),
    (r"(?s)NOT BETTER THAN UNTRAINED.*?trained one\.\n", ""),
    (r'/(best|last)"\)', '/<best or last>")'),
    (r"(?<= )[+-](?=\d+\.\d)", " "),
    (r"in \d+%", "in #%"),
    (r"norm [\d.e+-]+", "norm #"),
    (r"\d+\.\d+|(?<=\.)\d+\b", lambda found: re.sub(r"\d", "#", found[0])),
    (r"(?m)(±[^±\n]*± \S+) +[\d,]+$", r"\1  #"),
    (r"(?m)^(weight of the best|choices .*\)|lead .*nats|batch +\d+) .*$", r"\1 #"),
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    save_decoder(folder / "tiny")
    write_tiny_data(folder, 24)
    write_tiny_data_into(folder / LONG)
    (folder / "c.yaml").write_text(yaml.safe_dump(MODEL))
    compared = {"runs": {"infonce": {"objective": "infonce"}}, "seeds": [0, 1]}
    short = {**MODEL, "max_steps": 2, "output_dir": "comparison", "compare": compared}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(short))
    untold = [{k: v for k, v in row.items() if k != "target"} for row in make_rows(4)]
    (folder / "untold.jsonl").write_text("\n".join(map(json.dumps, untold)))
    return folder


def write_tiny_data_into(folder: Path) -> None:
    folder.mkdir()
    _, beir = write_tiny_data(folder, 12)
    for part in list(beir.iterdir()):
        part.rename(folder / part.name)


@pytest.fixture
def dream(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command in the workspace, and return what it prints."""
    monkeypatch.chdir(workspace)
    # No wait counts as long, however loaded the machine is.
    monkeypatch.setattr(console, "FIRST_LINE", 1e6)
    monkeypatch.setattr("dream_training.training.callbacks.EVERY_LINE", 1e6)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(command: str | list[str]) -> str:
        words = command.split() if isinstance(command, str) else command
        result = CliRunner().invoke(app, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return run


@pytest.mark.skipif(
    not library_keeps_lengths(),
    reason="sentence-transformers before 6 has one length for both kinds of text, and runs say so",
)
def test_the_outputs(dream: Callable[..., str]) -> None:
    """One test: the commands build on each other."""
    differing = []
    for name, command in COMMANDS.items():
        output = dream(command)
        for line in output.splitlines():
            assert len(line) <= 80 or LONG in line, (name, line)
        path = GOLDEN / f"{name}.txt"
        found = masked(output)
        if os.environ.get("DREAM_WRITE_GOLDEN"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(found, encoding="utf-8")
        elif found != path.read_text(encoding="utf-8"):
            differing.append(f"{path.name}:\n{path.read_text(encoding='utf-8')}\nnow:\n{found}")
    assert not differing, "\n".join(differing)


def masked(text: str) -> str:
    """What a command printed, without what depends on the machine."""
    for pattern, replacement in VOLATILE:
        text = re.sub(pattern, replacement, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_every_help_fits_and_is_complete(dream: Callable[..., str]) -> None:
    overview = dream("--help")
    assert "..." not in overview.replace("COMMAND [ARGS]...", "")
    commands = re.findall(r"(?m)^  (\S+)  ", overview.split("Commands:")[1])
    assert {"train", "evaluate", "data"} <= set(commands)
    names = [[name] for name in commands if name not in ("bench", "data")]
    names += [["data", name] for name in ("prepare", "stats", "targets")]
    for words in ([], ["data"], *names):
        for line in dream([*words, "--help"]).splitlines():
            assert len(line) <= 80, (words, line)
