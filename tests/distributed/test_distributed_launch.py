"""``dream train`` under torchrun, against one process, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from dream_training.config import TrainConfig
from dream_training.config_groups import DistributionConfig
from dream_training.distributed.engine import check_trainer, engine_arguments
from dream_training.distributed.launched import refuse_several
from dream_training.training.driver import train
from dream_training.training.resuming import CHECKPOINTS
from helpers import engines_on_cpu
from helpers.own_process import run_command, run_dream
from helpers.tiny import write_tiny_data

pytestmark = pytest.mark.long

_ZERO = (
    'deepspeed={"zero_optimization": {"stage": %d}, "train_micro_batch_size_per_gpu": "auto", '
    '"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}'
)
# Keys after the command, and the environment.
ENGINES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "ddp": ((), {}),
    "fsdp2": (
        ("fsdp=true", "reader_sharding=sharded", "mini_batch_size=1"),
        {"PRETEND": "MULTI_GPU"},
    ),
    # What accelerate launch --use_fsdp --fsdp_version 2 sets.
    "accelerate": (
        (),
        {
            "PRETEND": "MULTI_GPU",
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        },
    ),
    "zero2": ((_ZERO % 2,), {"PRETEND": "DEEPSPEED", "DS_ACCELERATOR": "cpu"}),
    "zero3": (
        (_ZERO % 3, "reader_sharding=sharded", "mini_batch_size=1"),
        {"PRETEND": "DEEPSPEED", "DS_ACCELERATOR": "cpu"},
    ),
}


def make_config(folder: str, tmp_path: Path, **changes: Any) -> TrainConfig:
    data, beir = write_tiny_data(tmp_path, 24)
    settings = {
        "reader": folder,
        "retriever": folder,
        "retriever_layers": 2,
        "lora_r": 4,
        "train_data": str(data),
        "eval_data": str(beir),
        "heads": "auto",
        "top_k": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "max_steps": 2,
        "eval_steps": 2,
        "device": "cpu",
        "output_dir": str(tmp_path / "one"),
    }
    return TrainConfig(**{**settings, **changes})


def train_with_two(
    config: TrainConfig, *overrides: str, engine: str = "ddp", launcher: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``dream train`` in two processes, which torchrun starts unless ``launcher`` is false."""
    keys, own = ENGINES[engine]
    path = Path(config.output_dir).parent / "config.yaml"
    path.write_text(json.dumps(config.flat()))
    arguments = ("train", path, *keys, *overrides)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
    if not own and not launcher:
        return run_dream(*arguments, env=environment, processes=2)
    return run_command(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *((engines_on_cpu.__file__,) if own else ("-m", "dream_training.cli")),
        *arguments,
        env=environment,
    )


def one_head(folder: Path) -> str:
    path = folder / "heads.yaml"
    path.write_text("- 1-0\n")
    return str(path)


def history(folder: Path) -> tuple[list[float], list[float], list[float]]:
    found = json.loads((folder / "history.json").read_text())
    steps, evaluations = found["steps"], found["evaluations"]
    return (
        [step["loss"] for step in steps],
        [step["weight_on_positive"] for step in steps],
        [evaluation["ndcg_at_10"] for evaluation in evaluations],
    )


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.soak),
        pytest.param("accelerate", marks=pytest.mark.soak),
        pytest.param("zero2", marks=pytest.mark.soak),
        pytest.param("zero3", marks=pytest.mark.soak),
    ],
)
def test_two_processes_train_as_one_does(folder, tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = make_config(folder, tmp_path)
    expected = train(config)
    done = train_with_two(
        config,
        *("gather_across_devices=true", "batch_size=2", f"output_dir={tmp_path / 'two'}"),
        engine=engine,
    )
    assert done.returncode == 0, done.stderr
    losses, weights, scores = history(tmp_path / "two")
    one = history(tmp_path / "one")
    assert losses == pytest.approx(one[0], rel=1e-4) and losses[0] != losses[1]
    assert weights == pytest.approx(one[1], rel=1e-3)
    assert scores == pytest.approx(one[2])
    assert done.stdout.count("step 2  nDCG@10") == 1, "one process prints"
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {path.name for path in (tmp_path / "one").iterdir()}
    loaded = SentenceTransformer(str(tmp_path / "two" / "last"), device="cpu")
    texts = ["a text", "another"]
    assert loaded.encode(texts) == pytest.approx(expected.model.encode(texts), abs=1e-4)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.soak)])
def test_two_processes_resume_where_they_stopped(folder, tmp_path: Path, engine: str) -> None:
    """From the middle of a run whose last checkpoints are lost, bit for bit."""
    options = {"max_steps": 4, "save_steps": 1, "keep_checkpoints": 4, "batch_size": 2}
    config = make_config(folder, tmp_path, **options)
    done = train_with_two(config, engine=engine, launcher=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "one"
    expected, weights = history(out), (out / "last" / "model.safetensors").read_bytes()
    for step in (3, 4):
        shutil.rmtree(out / CHECKPOINTS / f"step-{step:08d}")
    shutil.rmtree(out / "last")
    done = train_with_two(config, "--resume", engine=engine, launcher=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming after step 2") == 1, done.stdout
    assert history(out) == expected and len(expected[0]) == 4
    assert (out / "last" / "model.safetensors").read_bytes() == weights
    if engine == "ddp":
        with pytest.raises(ValueError, match="was written by 2 processes, and these are 1"):
            train(config, resume=True)


@pytest.mark.soak
def test_one_failing_process_ends_the_others(folder, tmp_path: Path) -> None:
    """One target is too long for the reader, and one process has it in its batch."""
    options = {"eval_data": None, "report_queries": 0, "target_max_len": 1000, "max_steps": 50}
    config = make_config(folder, tmp_path, heads=one_head(tmp_path), top_k=None, **options)
    with Path(config.train_data).open("a", encoding="utf-8") as file:
        row = {"query": "q", "target": "long " * 120, "documents": ["d"], "positive": 0}
        file.write("\n" + json.dumps(row))
    done = train_with_two(config)
    assert done.returncode != 0
    assert done.stderr.count("does not fit into the reader's context of 512 tokens") == 1


def test_an_engine_that_would_not_run_is_refused() -> None:
    """Accelerate would train with DDP without a warning."""
    config = TrainConfig(reader="r", train_data="t", fsdp=True)
    trainer = SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=False, args=SimpleNamespace(device="cpu")
    )
    with pytest.raises(ValueError, match="fsdp needs torchrun or accelerate launch, and GPUs"):
        check_trainer(config.distribution, trainer, False)
    check_trainer(DistributionConfig(), trainer, False)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="learnable_temperature must be false with FSDP and"):
        check_trainer(DistributionConfig(), trainer, True)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"fsdp": True, "deepspeed": "zero3.json"}, "must not both be set"),
        ({"fsdp_config": {}}, "fsdp_config must be null unless fsdp is true"),
        ({"distributed_timeout": 0}, "distributed_timeout must be positive"),
        ({"gather_across_devices": True, "pool": "mined"}, "must be false with pool 'mined'"),
        ({"reader_sharding": "split"}, "reader_sharding must be one of"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(reader="r", train_data="t", **changes)


def test_the_engine_is_the_trainers_own_argument(tmp_path: Path, monkeypatch) -> None:
    for name in ("FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD"):
        monkeypatch.setenv(name, "left as it was afterwards")
    assert engine_arguments(DistributionConfig()) == {"ddp_timeout": 600}
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"fsdp_reshard_after_forward": False}))
    found = engine_arguments(DistributionConfig(fsdp=True, fsdp_config=str(path)))
    assert found["fsdp_config"] == {"version": 2, "reshard_after_forward": False}
    assert (os.environ["FSDP_VERSION"], os.environ["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "false")
    found = engine_arguments(DistributionConfig(deepspeed="zero3.json"))
    assert found["deepspeed"] == "zero3.json"


def test_only_training_runs_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_several("dream doctor")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"only dream train and dream teach run in several .* got 4"
    ):
        refuse_several("dream doctor")
