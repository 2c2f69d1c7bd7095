"""Head files: both forms of QRHead, their provenance, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from dream_kernels import HeadFile, read_heads, write_heads
from dream_kernels.head_file import read_chosen_heads

FILE = HeadFile(
    heads=[(17, 3), (2, 0), (5, 11)],
    scores={(17, 3): 0.5, (2, 0): 0.25, (5, 11): -0.125},
    provenance={"criterion": "qr_mass", "null_query": "N/A"},
)


@pytest.mark.parametrize("name", ("heads.yaml", "heads.yml", "heads.json"))
@pytest.mark.parametrize("chosen", (None, 1, 3))
def test_what_is_written_is_read(tmp_path, name: str, chosen: int | None) -> None:
    file = replace(FILE, chosen=chosen)
    assert read_heads(write_heads(tmp_path / "new" / name, file)) == file


def test_a_file_names_the_chosen_heads_as_other_projects_expect(tmp_path) -> None:
    path = write_heads(tmp_path / "heads.yaml", FILE.choose(2))
    content = yaml.safe_load(path.read_text())
    assert content["attn_head_set"] == "17-3,2-0" and content["top_k"] == 2
    assert content["head_scores"] == {"17-3": 0.5, "2-0": 0.25, "5-11": -0.125}
    content["attn_head_set"] += ",5-11"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="top_k must be 3, the number of heads in attn_head_set"):
        read_heads(path)
    del content["top_k"]
    content["attn_head_set"] = "5-11"  # edited by hand: what is named is chosen
    path.write_text(yaml.safe_dump(content))
    assert read_heads(path).by_layer() == {5: [11]}
    assert read_heads(path).heads == [(5, 11), (17, 3), (2, 0)]
    # Without scores nothing is left of those that were not chosen.
    drawn = HeadFile(FILE.heads, provenance={"criterion": "random"}, chosen=2)
    again = read_heads(write_heads(tmp_path / "drawn.yaml", drawn))
    assert again.heads == FILE.heads[:2] and again.by_layer() == {2: [0], 17: [3]}


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


def test_by_layer_takes_the_chosen_heads(tmp_path) -> None:
    assert FILE.by_layer(2) == FILE.choose(2).by_layer() == {2: [0], 17: [3]}
    assert FILE.choose(2).by_layer(1) == {17: [3]}
    assert HeadFile(FILE.heads).by_layer() == {2: [0], 5: [11], 17: [3]}, "a published list"
    with pytest.raises(ValueError, match=r"top_k must lie in 1 \.\. 3, got 4"):
        FILE.by_layer(4)


@pytest.mark.parametrize("name", ("heads.yaml", "heads.json"))
def test_a_ranking_without_a_choice_needs_top_k(tmp_path, name: str) -> None:
    path = write_heads(tmp_path / name, FILE)
    message = "heads.*: the heads are a ranking of 3 in which none are chosen: give top_k"
    with pytest.raises(ValueError, match=message):
        read_chosen_heads(path)
    assert read_chosen_heads(path, 1).by_layer() == {17: [3]}
    # All heads in random order, as this project once wrote them.
    random = HeadFile(FILE.heads, provenance={"criterion": "random"})
    with pytest.raises(ValueError, match="a ranking of 3"):
        random.by_layer()


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
