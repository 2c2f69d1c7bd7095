"""What ``dream teach`` and training on its folder refuse, and what a killed teaching leaves."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from dream_training.config import TrainConfig
from dream_training.data.taught_folder import read_taught
from dream_training.preflight.diagnosis import diagnose, has_fault
from dream_training.preflight.dry_run import dry_run
from dream_training.teaching import teach as module
from dream_training.teaching.teach import teach
from dream_training.training.driver import train
from dream_training.training.taught import check_taught
from helpers.objectives import with_candidates
from helpers.own_process import in_own_process
from helpers.taught import rows_of, same_rows, teaching_config, write_rows
from helpers.tiny import make_rows, quiet, save_decoder, write_tiny_data


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    return teaching_config(tiny_model, tmp_path)


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A folder that no test changes, and the config that it was taught with."""
    folder = tmp_path_factory.mktemp("taught")
    config = teaching_config(tiny_model, folder)
    teach(config, folder / "taught", console=quiet())
    return config, folder / "taught"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "replug"}, "dream teach needs objective 'dream' .* got replug"),
        ({"teaching": "direct"}, "dream teach needs .* got teaching 'direct'"),
        ({"streaming": True}, "streaming must be false for dream teach"),
        ({"reader_sharding": "sharded"}, "reader_sharding must be 'replicated' for dream teach"),
    ],
)
def test_a_config_that_cannot_be_taught_is_refused(config, tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        teach(config.with_changes(**changes), tmp_path / "taught", console=quiet())
    assert not (tmp_path / "taught").exists()


def test_a_damaged_file_is_named(config, tmp_path: Path) -> None:
    folder = tmp_path / "taught"
    teach(config, folder, console=quiet())
    (path,) = folder.glob("train-*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{path.name}: is damaged"):
        read_taught(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"1 of 1 files are missing, .*run dream teach again"):
        read_taught(folder)
    assert teach(config, folder, console=quiet()).lines == 10
    assert len(read_taught(folder)) == 10
    stranger = pq.read_table(path).replace_schema_metadata({b"dream_taught": b"{}"})
    pq.write_table(stranger, path)
    with pytest.raises(ValueError, match="was taught by another reader or from other lines"):
        read_taught(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": "joint"}, "context is 'joint', and .* was taught with 'independent'"),
        ({"target_max_len": 7}, "target_max_len is 7, and .* was taught with 32"),
        ({"pool": "both"}, "pool is 'both', and .* was taught with 'mined'"),
        ({"heads": {2: [1]}}, r"heads .* are \{2: \[1\]\}, and .* was taught with \{0: "),
        ({"dtype": "bfloat16"}, "reader .* is not the one that .*: its weights, their type or"),
        ({"reader": {"initializer_range": 0.5}}, "reader .*other is not the one that .*/tiny"),
        ({"train_data": 11}, r"1 of 11 lines that .* was not taught with.*'Where is the"),
    ],
    ids=lambda changes: next(iter(changes)) if isinstance(changes, dict) else None,
)
def test_another_folder_is_not_resumed(taught, tmp_path: Path, changes: dict, message: str) -> None:
    config, folder = taught
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(ValueError, match=message):
        teach(config.with_changes(**written(changes, config, tmp_path)), folder, console=quiet())
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def written(changes: dict[str, Any], config: TrainConfig, tmp_path: Path) -> dict[str, Any]:
    """Changes of a config, with the files that they name."""
    changes = dict(changes)
    if "heads" in changes:
        path = tmp_path / "other.yaml"
        path.write_text('attn_head_set: "2-1"\n')
        changes["heads"] = str(path)
    if isinstance(changes.get("reader"), dict):
        changes["reader"] = str(save_decoder(tmp_path / "other", **changes["reader"]))
    if "train_data" in changes:
        lines = Path(config.data.train_data).read_text().splitlines()
        path = tmp_path / "more.jsonl"
        write_rows(path, make_rows(changes["train_data"])[-1:])
        path.write_text("\n".join([*lines, path.read_text()]))
        changes["train_data"] = str(path)
    return changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "both"}, "pool is 'both', and taught .* was taught with 'mined': set pool=mined"),
        ({"documents_per_query": 2}, "documents_per_query is 2, .* set documents_per_query=null"),
        ({"mode": "bias"}, "mode is 'bias', and taught .* was taught with 'reweight'"),
        ({"heads": {2: [1]}}, r"heads .* are \{2: \[1\]\}, and taught .* was taught with \{0: "),
        ({"reader": {}}, "reader is .*other, and taught .* was taught by .*tiny"),
        ({"train_data": 11}, r"train_data .* has 1 of 11 lines that taught .* was not taught with"),
    ],
    ids=lambda changes: next(iter(changes)) if isinstance(changes, dict) else None,
)
def test_training_refuses_the_folder_of_another(
    taught, tmp_path: Path, changes: dict, message: str
) -> None:
    config, folder = taught
    config = config.with_changes(taught=str(folder))
    check_taught(config)  # everything is named, and is what the folder says
    with pytest.raises(ValueError, match=message):
        check_taught(config.with_changes(**written(changes, config, tmp_path)))


def test_training_asks_for_a_whole_folder(config, tmp_path: Path) -> None:
    bare = TrainConfig(taught=str(tmp_path / "nothing"), retriever=config.retriever.model)
    assert bare.reader.model == "none" and bare.data.train_data == bare.data.taught
    with pytest.raises(FileNotFoundError, match=r"taught .*nothing: is no folder of dream teach"):
        train(bare.with_changes(output_dir=str(tmp_path / "run")), console=quiet())
    for changes, message in (
        ({"objective": "infonce"}, "taught needs objective 'dream' .* got infonce"),
        ({"teaching": "direct"}, "taught needs .* got teaching 'direct'"),
        ({"gather_across_devices": True}, "gather_across_devices must be false with taught"),
        ({"streaming": True}, "streaming must be false with taught"),
        ({"taught": None}, "reader must name a language model unless taught is given"),
    ):
        with pytest.raises(ValueError, match=message):
            bare.with_changes(**changes)


def test_a_line_without_a_choice_is_named(config, tmp_path: Path) -> None:
    rows = make_rows(4)
    for row in rows:
        row["documents"] = [*row["documents"], "Another."]
    rows[2]["documents"] = ["The same text.", "the  same text."]
    data = write_rows(tmp_path / "same.jsonl", rows)
    message = r"same.jsonl:3: all its candidates are the same text, .* in 1 of 4 lines: add"
    with pytest.raises(ValueError, match=message):
        teach(config.with_changes(train_data=data), tmp_path / "taught", console=quiet())
    rows[1]["documents"] = ["Alone."]
    write_rows(tmp_path / "same.jsonl", rows)
    with pytest.raises(ValueError, match=r"same.jsonl:2: has one candidate, .* in 2 of 4 lines"):
        teach(config.with_changes(train_data=data), tmp_path / "taught", console=quiet())


def test_a_line_that_is_left_over_shares_a_pool(config, tmp_path: Path) -> None:
    """Nine lines in batches of four; where all have one document it shows before any reading."""
    rows = make_rows(9)
    shared = config.with_changes(
        pool="in_batch", train_data=write_rows(tmp_path / "nine.jsonl", rows), max_steps=2
    )
    folder = tmp_path / "taught"
    teach(shared, folder, console=quiet())
    sizes = [len(row["documents"]) for row in rows_of(folder)]
    assert sizes == [4] * 4 + [5] * 5
    run = shared.with_changes(taught=str(folder), train_data=str(folder))
    result = train(run, console=quiet())
    assert sorted(round(math.exp(s["max_entropy"])) for s in result.history.steps) == [4, 5]
    for row in rows:
        row["documents"] = ["The only one."]
    write_rows(tmp_path / "nine.jsonl", rows)
    with pytest.raises(ValueError, match=r"a batch has one document, .* in 4 lines such as that"):
        teach(shared, tmp_path / "other", console=quiet())
    assert not list((tmp_path / "other").iterdir())


def test_a_target_that_no_document_changes(config, tmp_path: Path, monkeypatch) -> None:
    """Where it is one line's it is counted; where it is everyone's the heads are at fault."""
    flat: list[str] = []
    judge = module.judge

    def indifferent(reader, prefix, queries, targets):
        verdict = judge(reader, prefix, queries, targets)
        for b, query in enumerate(queries):
            if query in flat or not flat:
                verdict.logits[b] *= 1e-6
        return verdict

    monkeypatch.setattr(module, "judge", indifferent)
    folder = tmp_path / "taught"
    message = "no document changes the target of any of 10 lines, .*the reader's heads"
    with pytest.raises(ValueError, match=message):
        teach(config, folder, console=quiet())
    flat += [row["query"] for row in make_rows(10)[3:5]]
    assert teach(config, folder, console=quiet()).flat == 2
    # The last line of a folder may be such a one.
    flat[:] = []
    more = config.with_changes(train_data=str(tmp_path / "more.jsonl"))
    write_rows(tmp_path / "more.jsonl", with_candidates(11)[10:])
    assert teach(more, folder, append=True, console=quiet()).flat == 1


KILLED_AT = (("fsync", 4), ("replace", 3), ("fsync", 9), ("rename", 1))


def kill_in_teaching(config: TrainConfig, folder: Path, point: str, count: int) -> bool:
    """Teach in a forked process that is killed at a file system call; whether it was."""
    process = os.fork()
    if not process:
        code = 1
        try:
            torch.set_num_threads(1)
            original, calls = getattr(os, point), [0]

            def counted(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(os, point, counted)
            teach(config, folder, lines_per_file=4, console=Console(file=io.StringIO()))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_again_and_again(config: TrainConfig, folder: Path) -> list[bool]:
    return [kill_in_teaching(config, folder, point, count) for point, count in KILLED_AT]


def test_a_killed_teaching_is_resumed(config, tmp_path: Path) -> None:
    """At moments before, within and after the writing of files; what is there is whole."""
    killed = in_own_process(kill_again_and_again, config, tmp_path / "killed")
    assert sum(killed) >= 3
    teach(config, tmp_path / "killed", lines_per_file=4, console=quiet())
    teach(config, tmp_path / "alone", lines_per_file=4, console=quiet())
    same_rows(rows_of(tmp_path / "alone"), rows_of(tmp_path / "killed"))
    assert len(read_taught(tmp_path / "killed")) == 10


def test_a_full_disk_costs_what_is_not_written(config, tmp_path: Path, monkeypatch) -> None:
    folder, write = tmp_path / "taught", module.write_parquet

    def full(path: Path, *arguments: Any) -> None:
        if path.name == "train-00000-00001.parquet":
            raise OSError(28, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(module, "write_parquet", full)
    with pytest.raises(OSError, match=r"No space left on device.*train-00000-00001.parquet"):
        teach(config, folder, lines_per_file=4, console=quiet())
    assert [path.name for path in folder.glob("train-*")] == ["train-00000-00000.parquet"]
    monkeypatch.setattr(module, "write_parquet", write)
    assert teach(config, folder, lines_per_file=4, console=quiet()).lines == 6


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", "other", "manifest.json: is no manifest of dream teach"),
        ("lines", "10", r"manifest.json: lines must be a positive number, got '10'"),
        ("settings", {"batch_size": 0}, "batch_size must be a positive number, got 0"),
        ("lines", 11, "candidates.parquet: must hold 11 lines, got 10"),
    ],
)
def test_a_manifest_is_checked(taught, tmp_path: Path, name: str, value: Any, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(taught[1], folder)
    path = folder / "lines-00000" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=message):
        teach(taught[0], folder, console=quiet())


@pytest.mark.parametrize(
    "column", ("logits", "positive", "documents", "query", "nothing"), ids=lambda name: name
)
def test_verdicts_are_checked(taught, tmp_path: Path, column: str) -> None:
    """A file of the right origin with a wrong line, or with other columns."""
    folder = tmp_path / "copy"
    shutil.copytree(taught[1], folder)
    (path,) = folder.glob("train-*.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    wrong = {
        "logits": [float("nan"), *rows[3]["logits"][1:]],
        "positive": len(rows[3]["documents"]),
        "documents": rows[3]["documents"][:-1],
        "query": None,
    }
    if column == "nothing":
        table = table.drop_columns(["origins"])
    else:
        rows[3][column] = wrong[column]
        table = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(table, path)
    columns, lines = "its columns must be query, target", "each line must have a query"
    with pytest.raises(ValueError, match=columns if column == "nothing" else lines):
        read_taught(folder)


def test_what_looks_at_a_run_takes_the_folder(taught, tmp_path: Path) -> None:
    """The doctor and the dry run, without a reader, and with pools that stay together."""
    config, _ = taught
    data, _ = write_tiny_data(tmp_path, 12)
    shared = config.with_changes(pool="both", train_data=str(data))
    teach(shared, tmp_path / "shared", console=quiet())
    run = shared.with_changes(
        taught=str(tmp_path / "shared"), train_data=str(tmp_path / "shared"), reader="none",
        heads="auto",
    )  # fmt: skip
    console = quiet()
    plan = dry_run(run, console)
    assert plan.reader_weights == plan.read_tokens == 0 and plan.documents == 4
    assert "reader      none" in console.file.getvalue()
    checks = diagnose(run)
    assert not has_fault(checks)
    assert [check.name for check in checks] == [
        "queries", "passages", "weights", "gradient", "time and memory"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"batch_size is 3, and taught .* with 4"):
        dry_run(run.with_changes(batch_size=3), quiet())
