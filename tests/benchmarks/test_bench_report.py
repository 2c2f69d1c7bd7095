"""Records, tables, plots and floors."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dream_benchmarks
from dream_benchmarks import plots
from dream_benchmarks import records as store
from dream_benchmarks.cases import Case, cpu_cases, full_sequences, gpu_cases, make_inputs
from dream_benchmarks.floors import H100, floor_of, floor_table
from dream_benchmarks.kernel import Settings, run_kernel
from dream_benchmarks.report import HEAD, render, write_page
from dream_benchmarks.scaling import Axis, fitted_exponent, run_scaling
from dream_benchmarks.tables import print_rows
from dream_benchmarks.targets import findings, unmeasured
from dream_benchmarks.work import Work, backward_work, forward_work
from dream_training.console import make_console

PACKAGE = Path(dream_benchmarks.__file__).resolve().parent
CASE = Case(
    "shared pool", batch=2, query_heads=3, key_heads=1, head_dim=16, rows=4, prefix=32, local=4,
    documents=4, covered=32,
)  # fmt: skip
PEERS = ["ours (cpu)", "eager", "sdpa, no scores, expanded"]


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    settings = Settings(peers=PEERS, runs=3, seconds=0.5, memory=False, quick=True)

    def quietly(*_: object) -> None:
        """Print nothing."""

    cases = [CASE, replace(CASE, gradients=("scores",)), replace(CASE, dtype="bfloat16")]
    axis = Axis(
        "prefix", "prefix", [16, 64], lambda n: replace(CASE, prefix=int(n), covered=int(n))
    )
    return [
        *run_kernel(cases, settings, quietly, "kernel"),
        *run_scaling([axis], settings, quietly),
        *_steps(),
    ]


def _steps() -> list[dict]:
    """A step record like those of the suite, without training anything."""
    from dream_benchmarks.environment import provenance

    def quantile(x: float) -> dict:
        return {"median": x, "lower": x, "upper": x, "least": x, "runs": 1}

    return [
        {
            "schema": 1, "suite": "step", "quick": True,
            "environment": provenance(torch.device("cpu")),
            "peer": way, "status": "ok", "reason": None, "model": "tiny", "dtype": "float32",
            "batch": 2, "documents": 2, "document_tokens": 8, "note": "", "tokens": 100,
            "total": quantile(seconds),
            "phases": {"reader": quantile(seconds), "optimiser": quantile(0.0)},
            "tokens_per_second": 100 / seconds, "ratio": 4.0 / seconds, "loss": 1.0,
            "loss_difference": 0.0, "gradient_cosine": 1.0, "gradient_size": 1.0,
            "models_bytes": 10, "peak_bytes": int(100 * seconds),
        }
        for way, seconds in (("naive", 4.0), ("prefix, shared pool", 0.25), ("another", 1.0))
    ]  # fmt: skip


def test_records_round_trip(measured, tmp_path) -> None:
    path = store.write(tmp_path / "some" / "kernel.jsonl", measured)
    assert store.read(path.parent) == measured
    assert [p.name for p in path.parent.iterdir()] == ["kernel.jsonl"]


def test_a_stopped_suite_keeps_what_it_measured(measured, tmp_path) -> None:
    keeper = store.Keeper(tmp_path, "kernel")
    assert keeper.add([]) is None
    keeper.add(measured[:2])
    keeper.replace_last(measured[1:3])
    keeper.replace_last(measured[:3])
    assert store.read(tmp_path) == measured[:3]
    keeper.add(measured[3:4])
    assert store.read(tmp_path) == measured[:4] and keeper.path.parent == tmp_path


@pytest.mark.parametrize(
    "spoil,message",
    (
        (lambda r: r.pop("ratio"), "exactly its fields"),
        (lambda r: r["case"].update(rows="4"), "case.rows"),
        (lambda r: r["forward"].update(median=True), "forward.median"),
        (lambda r: r.update(status="fine"), "status must be one of"),
        (lambda r: r.update(reason="none"), "reason"),
        (lambda r: r.update(schema=0), "schema must be"),
        (lambda r: r.update(suite="kernels"), "suite must be one of"),
    ),
)
def test_a_record_that_breaks_the_schema_is_not_written(measured, tmp_path, spoil, message) -> None:
    record = copy.deepcopy(measured[0])
    spoil(record)
    with pytest.raises(ValueError, match=message):
        store.write(tmp_path / "kernel.jsonl", [record])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kernel.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"kernel.jsonl:1: .*" + message):
        store.read(tmp_path)


def test_the_recorded_results_validate() -> None:
    files = sorted((PACKAGE / "results").glob("*.jsonl"))
    if not files:
        pytest.skip("this checkout has no recorded results")
    recorded = store.read(PACKAGE / "results")
    assert recorded and not any(r["quick"] for r in recorded)


def test_the_report_draws_and_writes_the_same_page_twice(measured, tmp_path) -> None:
    umask = os.umask(0o027)
    try:
        store.write(tmp_path / "all.jsonl", measured)
        *drawn, page = write_page(tmp_path)
    finally:
        os.umask(umask)
    first = page.read_text()
    assert page == tmp_path / "README.md" and "| eager | reweight |" in first
    assert "times faster than the naive one | ≥ 8 | 16 | yes |" in first
    assert {p.name.split("-")[0] for p in drawn} == {"kernel", "scaling", "step"}
    for path in drawn:
        assert f"({path.relative_to(tmp_path)})" in first
        _assert_not_blank(path)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {tmp_path / "all.jsonl", page, *drawn}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    before = [path.read_bytes() for path in drawn]
    write_page(tmp_path)
    assert page.read_text() == first
    assert [path.read_bytes() for path in drawn] == before


def test_the_recorded_page_matches_the_records(monkeypatch) -> None:
    monkeypatch.setattr(plots, "save", lambda figure, path: (plots.plt.close(figure), path)[1])
    results = PACKAGE / "results"
    if not list(results.glob("*.jsonl")):
        pytest.skip("this checkout has no recorded results")
    recorded = store.read(results)
    drawn = plots.draw(recorded, results / "plots")
    assert all(path.is_file() for path in drawn)
    page = (results / "README.md").read_text(encoding="utf-8")
    assert page == HEAD + render(recorded, drawn, results), "run python -m benchmarks report"


def _assert_not_blank(path: Path) -> None:
    """Check that each quarter has something drawn, dark enough to read, and without colour."""
    import matplotlib.image

    pixels = torch.from_numpy(matplotlib.image.imread(path)[..., :3].copy())
    height, width, _ = pixels.shape
    assert height > 200 and width > 400
    for rows in pixels.split(-(-height // 2)):
        for quarter in rows.split(-(-width // 2), dim=1):
            assert 0.005 < (quarter.mean(-1) < 0.5).float().mean() < 0.6
    assert (pixels.amax(-1) - pixels.amin(-1)).max() < 0.05


def test_the_report_replaces_only_its_own_page(measured, tmp_path) -> None:
    with pytest.raises(ValueError, match="no records"):
        write_page(tmp_path)
    store.write(tmp_path / "all.jsonl", measured)
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"README\.md must be a page that this command wrote"):
        write_page(tmp_path)
    assert page.read_text() == "# Mine\n" and len(list(tmp_path.iterdir())) == 2


def test_targets_are_found_in_the_records_of_their_own_shape_only(measured) -> None:
    claims = [f.claim for f in findings(measured)]
    assert any("exponent" in claim for claim in claims) and any("tiny" in c for c in claims)
    assert not any("GEMM" in claim for claim in claims)  # the case above is not the target's shape
    record = copy.deepcopy(measured[0])
    record["case"] = cpu_cases()[0].record()
    record["forward_share_of_gemm"] = 0.4
    (found,) = (f for f in findings([record]) if "GEMM" in f.claim)
    assert not found.met and found.row()[-1] == "**no**"


def on_a_gpu(record: dict, case: Case, peer: str, seconds: float) -> dict:
    """The record of another peer and case, as a GPU would give it."""
    figure = dict.fromkeys(("median", "lower", "upper", "least"), seconds)
    return {
        **copy.deepcopy(record),
        "environment": {**record["environment"], "device_type": "cuda"}, "case": case.record(),
        "peer": peer, "forward": figure, "backward": figure, "total": figure,
        "ratio": seconds / 1e-3, "peak_bytes": int(1e9 * seconds),
    }  # fmt: skip


def test_gpu_targets_are_met_missed_or_not_measured(measured) -> None:
    pool = gpu_cases()[0]
    times = {"ours (triton)": 1e-3, "sdpa, no scores, expanded": 1e-3, "eager": 9e-3}
    records = [on_a_gpu(measured[0], pool, peer, seconds) for peer, seconds in times.items()]
    met = {f.claim.removeprefix(f"{pool.name}: "): f.met for f in findings(records)}
    assert met == {
        "forward over flash without scores": True,
        "forward and backward over flash without scores": False,
        "eager over ours": False,
        "our peak memory over eager's": False,
    }
    assert unmeasured(records) == [
        f"{pool.name}: FlexAttention over ours",
        f"{pool.name}: only-scores backward over the full one",
    ]
    assert unmeasured(measured) == []


def test_a_full_sequence_is_compared_with_plain_attention(measured) -> None:
    times = zip(full_sequences(), (1.1e-3, 1e-3))
    records = [on_a_gpu(measured[0], case, "ours (triton)", seconds) for case, seconds in times]
    found = findings(records)
    assert len(found) == 2 and all(f.met for f in found)
    assert found[0].measured == pytest.approx(1.1)
    assert len(unmeasured(records[:1])) == 2


def test_exponents_of_power_laws() -> None:
    assert fitted_exponent([(x, 3.0 * x**1.5) for x in (1, 2, 8, 64)]) == pytest.approx(1.5)
    assert fitted_exponent([(1.0, 2.0)]) is None


def test_the_committed_floors_match_the_code() -> None:
    text = (PACKAGE / "floors.md").read_text(encoding="utf-8")
    assert floor_table(H100) in text, "run: python -m benchmarks floors, and put it into floors.md"
    assert {c.name for c in gpu_cases() if not c.padding} == {
        line.split("|")[1].strip() for line in text.splitlines() if "documents, " in line
    }


def test_work_counts_matrix_products() -> None:
    visible = int(make_inputs(CASE).visible().sum())
    heads = CASE.batch * CASE.query_heads
    assert forward_work(CASE).operations == 2 * (2 * heads * visible * CASE.head_dim)
    local = heads * sum(range(1, CASE.rows + 1))
    expected = 2 * CASE.head_dim * (3 * heads * visible + 2 * local)
    assert backward_work(CASE).operations == expected
    only = backward_work(replace(CASE, gradients=("scores",)))
    assert only.operations == 2 * CASE.head_dim * 2 * heads * visible
    shared, own = forward_work(CASE), forward_work(replace(CASE, shared=False))
    assert own.bytes - shared.bytes == 4 * 2 * CASE.prefix * CASE.head_dim  # one more prefix


def test_a_floor_names_what_binds() -> None:
    floor = floor_of(Work(operations=750 * 10**12, bytes=3 * 10**12, exponentials=0), H100)
    assert floor.products == pytest.approx(1.0) and floor.memory == pytest.approx(1.0)
    assert floor.share == pytest.approx(1.0)


def test_a_partial_suite_keeps_the_rest_of_its_record(measured, tmp_path) -> None:
    store.Keeper(tmp_path, "kernel").add(measured)
    again = {**measured[0], "note": "measured again"}
    store.Keeper(tmp_path, "kernel", part=True).add([again])
    records = store.read(tmp_path)
    assert len(records) == len(measured) and again in records and measured[0] not in records
    store.Keeper(tmp_path, "kernel").add([again])
    assert store.read(tmp_path) == [again]


def test_a_wide_table_wraps(capsys) -> None:
    columns = ["peer", *(f"column {i}" for i in range(12))]
    rows = [["flash", *(str(i) * 8 for i in range(12))], ["other", "failed"]]
    console = make_console()
    console.width = 80
    print_rows(console, columns, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 6
    words = " ".join(lines)
    assert all(head in words for head in columns) and all(cell in words for cell in rows[0])
