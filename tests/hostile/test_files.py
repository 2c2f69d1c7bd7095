"""Files made to break what reads them, each refused by name and in bounded time."""

from __future__ import annotations

import gzip
import json
import pickle
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dream_kernels import parsing, read_heads
from dream_training.config import load_config
from dream_training.data import sources
from dream_training.data.beir_folder import read_beir_folder
from dream_training.data.jsonl import iterate_training_rows, read_training_data
from dream_training.data.raw_text import TextLengths
from dream_training.evaluation.results import read_evaluations
from dream_training.json_file import read_json
from dream_training.report.run_folder import read_run
from helpers.bombs import Bomb

# CPU time, many times what is needed: what takes longer has no bound.
SECONDS = 60.0
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + last] * 9)}]\n"
    for last, name in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + last] * 9)}]}}\n"
    for last, name in zip("abcdefgh", "bcdefghi")
)
YAML = {
    "aliases": (LAUGHS, "expands to more than 200,000 values"),
    "merges": (MERGES, "expands to more than 200,000 values"),
    "itself": ("a: &a [*a]", "must not contain itself"),
    "lists": ("[" * 100_000, "nested too deeply"),
    "maps": ("{a: " * 100_000, "nested too deeply"),
    "dashes": ("- " * 100_000, "nested too deeply"),
    "keys": ("? " * 100_000, "nested too deeply"),
    "digits": ("a: " + "9" * 100_000, "at most 300 digits"),
    "sexagesimal": ("a: " + ":".join(["1"] * 100_000), "at most 300 digits"),
    "float": ("a: " + ":".join(["1"] * 100_000) + ".5", "at most 300 digits"),
    "long": (" " * (parsing.MAX_YAML_CHARACTERS + 1), "at most 1,048,576 characters"),
    "month": ("a: 2024-13-45", "month must be in"),
    "tag": ('a: !!int ""', "does not fit its tag"),
    "nothing": ("a: !!timestamp x", "does not fit its tag"),
    "python": ('a: !!python/object/apply:os.system ["true"]', "not valid YAML"),
    "name": ("a: !!python/name:os.system", "not valid YAML"),
    "nul": ("a: \0", "not valid YAML"),
    "unhashable": ("? [a]\n: b", "not valid YAML"),
}
JSON = {
    "lists": ("[" * 100_000, "nested too deeply"),
    "maps": ('{"a":' * 100_000, "nested too deeply"),
    "digits": ('{"a": ' + "9" * 100_000 + "}", "not valid JSON"),
    "two": ("{} {}", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
    "nul": ("\0", "not valid JSON"),
}


@pytest.fixture(autouse=True)
def _in_time() -> None:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def refuses(read: Callable[[], object], *parts: str) -> str:
    """Return the message of the ``ValueError``, which has every part and is not long."""
    with pytest.raises(ValueError, match=r".") as caught:
        read()
    message = str(caught.value)
    assert type(caught.value) is ValueError, "not of a library"
    assert all(part in message for part in parts), message
    assert len(message) < 3000
    return message


@pytest.mark.parametrize("text, reason", YAML.values(), ids=YAML)
def test_yaml_bombs(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for read in (read_heads, load_config)[: 1 if text[:2] == "[[" else 2]:  # that one is slow
        refuses(lambda read=read: read(path), str(path), reason)


@pytest.mark.parametrize("text, reason", JSON.values(), ids=JSON)
def test_json_bombs(tmp_path: Path, text: str, reason: str) -> None:
    heads, result, data = (tmp_path / name for name in ("h.json", "e.json", "d.jsonl"))
    for path in (heads, result, data):
        path.write_text(text + "\n")
    refuses(lambda: read_heads(heads), str(heads), reason)
    refuses(lambda: read_evaluations(result), str(result), reason)
    if text:
        refuses(lambda: list(iterate_training_rows(data)), f"{data}:1", reason)
        (tmp_path / "corpus.jsonl").write_text(text + "\n")
        refuses(lambda: read_beir_folder(tmp_path), "corpus.jsonl:1", reason)


def test_aliases_of_a_reasonable_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("reader: &name smollm2\nretriever: *name\ntrain_data: t\n")
    assert load_config(path).retriever.model == "smollm2"


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("temperature", ".nan", "temperature must be a finite number"),
        ("learning_rate", ".inf", "learning_rate must be a finite number"),
        ("document_store_gb", "1e999", "document_store_gb must be a finite number"),
        ("max_steps", "9" * 200, "max_steps must be at most"),
        ("device", "cuda:0;x", "device must be written"),
        ("dtype", "load", "dtype must be one of"),
        ("output_dir", '"a\\0b"', "output_dir must be text, and it contains a NUL"),
        ("query_prompt", '"\\ud800"', "query_prompt must be text, and it contains half"),
        ("reader_prompt", "x" * 5000, "reader_prompt must be"),
    ],
)
def test_a_config_value_that_nothing_can_take(
    tmp_path: Path, key: str, value: str, reason: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"reader: r\ntrain_data: t\n{key}: {value}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000


def test_the_command_line_is_no_way_around(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("reader: r\ntrain_data: t\n")
    refuses(lambda: load_config(path, ["top_k=[1"]), "command line: top_k", "not valid YAML")
    refuses(lambda: load_config(path, ["top_k=" + "- " * 5000]), "nested too deeply")


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"1-2": NaN}', "must be a number, got nan"),
        ('{"1-2": 1e999}', "must be a number, got inf"),
        ('{"1-2": ' + "9" * 4000 + "}", "must be a number, got <whole number of"),
        ('{"' + "1" * 5000 + '-2": 1}', "layer-head"),
        ('{"1-2": 1, " 1-2 ": 2}', "named twice"),
        ('{"attn_head_set": 7}', "heads must be a list or a text"),
        ('{"attn_head_set": "1-2", "provenance": [1]}', "provenance must be a map"),
        ('"1-2"', "scores must map heads"),
    ],
)
def test_malformed_head_files(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "h.json"
    path.write_text(content)
    refuses(lambda: read_heads(path), str(path), reason)


LINE = '{"query": "q", "target": "t", "documents": ["a"]}\n'


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"query": "\xff", "target": "t", "documents": ["a"]}', "cannot be read as text"),
        (LINE.replace('q"', '\\ud800"', 2).encode(), "half of a surrogate pair"),
        (LINE.replace('"a"', '"\\udfff"').encode(), "half of a surrogate pair"),
        (LINE.replace('"a"', "NaN").encode(), "documents[0] must be a text"),
        (LINE.replace('["a"]', "[" * 100_000).encode(), "nested too deeply"),
        (LINE.replace('"a"', '{"text": [' + "1," * 10_000 + "1]}").encode(), "must be a text"),
        (LINE.replace('"q"', '" \\u2028\\t"').encode(), "must be a text that is not empty"),
        (b'{"' + b"k" * 100_000 + b'": 1, "documents": ["a"]}', "has no query"),
        (b'{"query_id": {"a": 1}, ' + LINE[1:].encode(), "query_id must be text or a number"),
        (b'{"query_id": "a\\u0000b", ' + LINE[1:].encode(), "contains a NUL"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINE.encode() + line.strip() + b"\n")
    message = refuses(lambda: list(iterate_training_rows(path)), str(path), reason)
    # A text is decoded in blocks: what is not UTF-8 may be found before its line is reached.
    assert f"{path}:2" in message or "as text" in message


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\n \t\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_mark_and_line_ends_are_ignored(tmp_path: Path, mark: str, ending: str) -> None:
    # Neither is a line end in JSON, but str.splitlines() treats both as one.
    row = {"query": "a\u2028b\x85c", "target": "t\x00\x01", "documents": ["d\x0b\x1c", "e\u2029"]}
    path = tmp_path / "d.jsonl"
    text = mark + ending.join([json.dumps(row, ensure_ascii=False)] * 2) + ending
    path.write_text(text, newline="", encoding="utf-8")
    rows = list(iterate_training_rows(path))
    assert [(r.query, r.target, list(r.documents)) for r in rows] == [tuple(row.values())] * 2
    assert read_training_data(path)[1]["documents"] == row["documents"]


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(LINE.encode() + b" " * 10**6))
    refuses(lambda: list(iterate_training_rows(path)), f"{path}:2", "at most 1,000 characters")


@pytest.mark.parametrize(
    "content, reason",
    [
        (gzip.compress(LINE.encode() * 1000)[:-12], "cannot be read as text"),
        (gzip.compress(LINE.encode())[:-8] + b"\0" * 8, "cannot be read as text"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0" + zlib.compress(b"x"), "cannot be read as text"),
        (b"not packed", "cannot be read as text"),
        (b"", "holds no line"),
    ],
    ids=("cut", "check sum", "wrong", "text", "empty"),
)
def test_damaged_packed_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(content)
    refuses(lambda: list(iterate_training_rows(path)), str(path), reason)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"query": ["q"], "target": ["t"], "documents": [["a"]]}), path)
    assert len(list(iterate_training_rows(path))) == 1
    content = path.read_bytes()
    for damaged in (content[:-20], b"PAR1" + b"\xff" * 64 + b"PAR1", content[:40] + content[60:]):
        path.write_bytes(damaged)
        for streaming in (False, True):
            rows = iterate_training_rows(path, streaming=streaming)
            refuses(lambda rows=rows: list(rows), str(path), "cannot be loaded")


def test_arrow_types_that_ask_to_be_unpickled(tmp_path: Path) -> None:
    """Before pyarrow 14.0.1, reading such a column ran what its metadata pickles."""
    bomb = Bomb(tmp_path / "ran")
    name = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(bomb),
    }
    field = pa.field("query", pa.string(), metadata=name)
    schema = pa.schema([field, pa.field("target", pa.string()), pa.field("positive", pa.string())])
    table = pa.table([["q"], ["t"], ["a"]], schema=schema)
    path = tmp_path / "d.parquet"
    pq.write_table(table, path)
    folder = tmp_path / "saved"
    folder.mkdir()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "x",
                    "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
                    "_output_all_columns": False, "_split": "train"})
    )  # fmt: skip
    (folder / "dataset_info.json").write_text("{}")
    # Newer ones leave the type unknown, and its column is read as what is stored.
    for source in (path, folder):
        assert next(iterate_training_rows(source)).query == "q"
    assert not bomb.went_off


IDS = ["../../etc/passwd", "a b", "'; DROP", "\u2028", "-1", "NaN", "\x01", "é" * 300, "q" * 5000]


@pytest.mark.parametrize("name", IDS)
def test_beir_ids_of_all_kinds_are_names_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": name, "text": "d"}))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": name, "text": "q"}))
    path = tmp_path / "qrels" / "test.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\n{name}\t{name}\t1\n", encoding="utf-8")
    corpus, queries, qrels = read_beir_folder(tmp_path)
    assert list(corpus) == list(queries) == list(qrels) == [name]
    rows = list(iterate_training_rows(tmp_path, split="test", need_target=False))
    assert rows[0].query_id == name


@pytest.mark.parametrize(
    "qrels, reason",
    [
        (b"q\td\t" + b"9" * 5000, "whole number"),
        (b"q\td\t9999999999", "whole number"),
        (b"q\td\t1e3", "whole number"),
        (b"q\td\t-2\nq\te\t\xff", "not text in UTF-8"),
        (b"q" * 100_000, "whole number"),
    ],
)
def test_malformed_qrels(tmp_path: Path, qrels: bytes, reason: str) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "d"}')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "q"}')
    path = tmp_path / "qrels" / "test.tsv"
    path.write_bytes(b"query-id\tcorpus-id\tscore\n" + qrels + b"\n")
    refuses(lambda: read_beir_folder(tmp_path), f"{path}:", reason)


def test_grades_below_minus_one_do_not_crash_the_process(tmp_path: Path) -> None:
    """In pytrec_eval they are indices of an array."""
    from dream_training.evaluation.retrieval import RetrievalTask, score_queries

    task = RetrievalTask({"q": "q"}, {"d": "d", "e": "e"}, {"q": {"d": -7, "e": 1}})
    scores = score_queries(task, {"q": {"d": 1.0, "e": 0.5}})
    zero = RetrievalTask({"q": "q"}, {"d": "d", "e": "e"}, {"q": {"d": 0, "e": 1}})
    assert scores == score_queries(zero, {"q": {"d": 1.0, "e": 0.5}})


def test_files_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lengths = TextLengths(4, 2, 2)
    for content, reason in ((b"\xff\xfe\0", "UTF-8"), (b"\0" * 100_000, "no text is long enough")):
        path.write_bytes(content)
        rows = iterate_training_rows(path, text_lengths=lengths)
        refuses(lambda rows=rows: list(rows), str(path), reason)


def test_damaged_files_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 10_000)
    (tmp_path / "history.json").write_text('{"steps": [], "evaluations": []}')
    refuses(lambda: read_run(tmp_path), "config.json", "nested too deeply")
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    refuses(lambda: read_json(tmp_path / "config.json"), "config.json", "not text in UTF-8")


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b.yaml", "x" * 5000 + ".yaml", "", ".", "/"):
        with pytest.raises((OSError, ValueError)) as caught:
            read_heads(name)
        assert not isinstance(caught.value, UnicodeError)
