"""Head files: both forms of QRHead, their provenance, and what is refused."""

from __future__ import annotations

import json

import pytest

from dream_kernels import HeadFile, read_heads, write_heads

FILE = HeadFile(
    heads=[(17, 3), (2, 0), (5, 11)],
    scores={(17, 3): 0.5, (2, 0): 0.25, (5, 11): -0.125},
    provenance={"criterion": "qr_mass", "null_query": "N/A"},
)


@pytest.mark.parametrize("name", ("heads.yaml", "heads.yml", "heads.json"))
def test_what_is_written_is_read(tmp_path, name: str) -> None:
    assert read_heads(write_heads(tmp_path / "new" / name, FILE)) == FILE


def test_files_of_other_projects_are_read(tmp_path) -> None:
    path = tmp_path / "heads.yaml"
    path.write_text('# top 3\nattn_head_set: "17-3,2-0, 5-11" # best first\nmodel: x\n')
    assert read_heads(path).heads == FILE.heads
    path.write_text("attn_head_set: [17-3, 2-0]\n")
    assert read_heads(path).heads == [(17, 3), (2, 0)]
    path.write_text("- 17-3\n- 2-0\n")
    assert read_heads(path).heads == [(17, 3), (2, 0)]
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"2-0": 0.25, "17-3": 0.5}))
    assert read_heads(path).heads == [(17, 3), (2, 0)]
    path.write_text(json.dumps([["2-0", 0.25], ["17-3", 0.5]]))
    assert read_heads(path) == HeadFile([(17, 3), (2, 0)], {(2, 0): 0.25, (17, 3): 0.5})


def test_by_layer_takes_the_best(tmp_path) -> None:
    assert FILE.by_layer() == {2: [0], 5: [11], 17: [3]}
    assert FILE.by_layer(2) == {2: [0], 17: [3]}
    with pytest.raises(ValueError, match=r"top_k must lie in 1 \.\. 3, got 4"):
        FILE.by_layer(4)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("heads.yaml", 'attn_head_set: "17-3,x"', "must be written \"layer-head\", got 'x'"),
        ("heads.yaml", 'attn_head_set: "1-1,1-1"', "head 1-1 is named twice"),
        ("heads.yaml", "attn_head_set: []", "names no head"),
        ("heads.yaml", "attn_head_set: [", "not valid YAML"),
        ("heads.json", "{", "not valid JSON"),
        ("heads.json", "{}", "names no head"),
        ("heads.json", '{"1-2": "high"}', "score of '1-2' must be a number"),
        ("heads.json", "3", "scores must map heads to numbers, got int"),
        ("heads.txt", "", "must end in .yaml, .yml or .json"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_heads(path)
    assert str(path) in str(error.value)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = write_heads(tmp_path / "heads.json", FILE)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_heads(path, HeadFile([(0, 0)], {(0, 0): 1.0}))
    assert read_heads(path) == FILE
    assert [p.name for p in tmp_path.iterdir()] == ["heads.json"]


def test_json_without_scores_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="there are none"):
        write_heads(tmp_path / "heads.json", HeadFile([(0, 0)]))
