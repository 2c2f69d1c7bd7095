"""The GPU acceptance: its stages in a limited time, rehearsed without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dream_benchmarks import acceptance, compile_ahead, records, stages
from dream_benchmarks.adapters import ADAPTERS, Prepared
from dream_benchmarks.cases import make_inputs
from dream_benchmarks.check import Oracle
from dream_benchmarks.stages import Order, Stage, check_record
from helpers.own_process import run_command

pytestmark = pytest.mark.long

# What the processes of the stages below run, with the file of their line as argument.
SCRIPTS = {
    "good": "open(sys.argv[1], 'w').write('all is well')",
    "crash": "import os; print('illegal access', file=sys.stderr); os.abort()",
    "wrong": "open(sys.argv[1], 'w').write('1 of 2 cases are wrong'); sys.exit(1)",
    "without a tool": "open(sys.argv[1], 'w').write('memcheck is not installed'); sys.exit(1)",
    # Its child would hold the machine after it.
    "hang": "import subprocess, time; subprocess.Popen(['sleep', '1000']); time.sleep(1000)",
    "too long": "",
    "last": "open(sys.argv[1], 'w').write('also well')",
}


def command(stage: Stage, order: Order, said: Path) -> list[str]:
    return [sys.executable, "-S", "-c", f"import sys; {SCRIPTS[stage.name]}", str(said)]


def test_no_stage_costs_another_one_its_time_or_its_records(tmp_path: Path) -> None:
    order = Order(str(tmp_path), True, 0.0, 1, 0.1)
    own = [
        Stage(name, "", 1.0 if name == "hang" else 600.0, 7e6 if name == "too long" else 0.0, str)
        for name in SCRIPTS
    ]
    acceptance.run_acceptance(
        own, order, minutes=1e5, cache=None, say=lambda text: None, command=command
    )
    rows = {r["peer"]: r for r in records.read(tmp_path)}
    assert list(rows) == ["acceptance", *SCRIPTS]
    assert {name: (rows[name]["status"], rows[name]["said"].split("(")[0]) for name in SCRIPTS} == {
        "good": ("ok", "all is well"),
        "crash": ("failed", "exit status -6: illegal access"),
        "wrong": ("failed", "1 of 2 cases are wrong"),
        "without a tool": ("refused", "memcheck is not installed"),
        "hang": ("failed", "stopped after 1 s; its records until then stay"),
        "too long": ("refused", rows["too long"]["said"]),
        "last": ("ok", "also well"),
    }
    assert rows["too long"]["said"].startswith("left out: it needs 7000000 s, ")


def test_a_part_leaves_the_other_records(tmp_path: Path) -> None:
    order = Order(str(tmp_path), True, 0.0, 1, 0.1)
    stages.keep(order, [check_record(order, name, "ok", "before", 0.0) for name in ("a", "good")])
    part = [Stage("good", "", 600.0, 0.0, str)]
    acceptance.run_acceptance(
        part, order, minutes=10, cache=None, say=lambda text: None, command=command
    )
    said = {r["peer"]: r["said"] for r in records.read(tmp_path)}
    assert said["a"] == "before" and said["good"] == "all is well"


def test_stages_are_chosen_by_name() -> None:
    assert [s.name for s in acceptance.chosen_stages(["step", "shapes"])] == ["shapes", "step"]
    assert len(acceptance.chosen_stages([])) == len(stages.STAGES)
    with pytest.raises(ValueError, match=r"stage must be one of correctness, .*, got 'speed'"):
        acceptance.chosen_stages(["speed"])


def test_it_is_rehearsed(tmp_path: Path) -> None:
    """The first stages, which tell most, and one that no longer fits."""
    result = run_command(
        sys.executable, "-m", "dream_benchmarks", "gpu-acceptance", "--rehearse", "--seconds", 0.1,
        "--stage", "correctness", "--stage", "shapes", "--output", tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("acceptance-*.jsonl")
    rows = records.read(tmp_path)
    assert all(r["quick"] for r in rows)
    checks = {r["peer"]: r for r in rows if r["suite"] == "gpu tests"}
    assert checks["correctness"]["said"] == "2 cases agree with the reference"
    assert checks["shapes"]["said"] == "1 of 1 shapes timed"
    assert sum(name.startswith("correct: ") for name in checks) == 2
    timed = [r for r in rows if r["suite"] == "acceptance" and r["status"] == "ok"]
    assert {"ours (triton)", "ours (cpu)", "sdpa, dense mask"} <= {r["peer"] for r in timed}
    lines = result.stdout.strip().splitlines()
    assert any("to be reached" in line for line in lines[-12:]), lines[-12:]
    assert str(path) in result.stdout


def test_a_kernel_that_is_wrong_is_named(monkeypatch, tmp_path: Path) -> None:
    order = Order(str(tmp_path), True, 60.0, 1, 0.1)
    verdicts = iter(({"ours (cpu)": None}, {"ours (cpu)": "output is off", "ours (triton)": None}))
    monkeypatch.setattr(stages, "complaints", lambda case, device: next(verdicts))
    with pytest.raises(SystemExit, match="1 of 2 cases are wrong"):
        stages.STAGES["correctness"].run(order)
    good, bad = records.read(tmp_path)
    assert (good["status"], bad["status"]) == ("ok", "wrong")
    assert bad["reason"] == "ours (cpu): output is off; ours (triton): agrees"


def test_every_dtype_is_checked_before_the_next_one_and_the_main_shapes_are_timed_first() -> None:
    cases = stages.checked_cases()
    dtypes = [case.dtype for case in cases]
    assert dtypes == sorted(dtypes, key=["bfloat16", "float16", "float32"].index)
    assert len(cases) == 3 * 12 and len({c.name for c in cases}) == 12
    main = stages.main_cases()
    assert len(main) == 8 and sum(case.padding > 0 for case in main) == 2
    assert {case.head_dim for case in main} == {64, 128}


def test_padded_cases_agree_with_the_reference() -> None:
    """Every peer that runs on a CPU takes the padding, or says that it cannot."""
    case = next(c for c in stages.checked_cases() if c.padding and c.mode == "bias")
    inputs = make_inputs(case)
    mask = inputs.attention_mask()
    assert mask is not None and (~mask).sum(-1).tolist() == [case.documents * case.padding] * 2
    oracle, agreed = Oracle(inputs), []
    for name, adapter in ADAPTERS.items():
        prepared = adapter.setup(inputs) if name != "flex_attention" else None
        if isinstance(prepared, Prepared):
            assert oracle.complaint(adapter, prepared) is None, name
            agreed.append(name)
    assert {"ours (cpu)", "eager", "sdpa, no scores, grouped", "sdpa, dense mask"} <= set(agreed)
    assert "sdpa, extra channel" not in agreed


def test_compile_ahead_knows_its_architectures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arch must be sm_80 or newer, got 'gfx942'"):
        compile_ahead.compile_cases("gfx942", tmp_path, [])


@pytest.mark.slow
def test_what_was_compiled_ahead_is_found_again(tmp_path: Path) -> None:
    cases = [c for c in stages.main_cases() if c.head_dim == 64][:1]
    count, _ = compile_ahead.compile_cases("sm_90", tmp_path, cases)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert count >= 4
    assert compile_ahead.compile_cases("sm_90", tmp_path, cases)[0] == count
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gpu-acceptance needs an NVIDIA GPU"):
        acceptance.require_gpu()
