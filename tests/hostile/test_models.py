"""Models that bring code or pickles: nothing of them is run, wherever the project loads a model."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dream_training.cli import app
from dream_training.config import TrainConfig
from dream_training.models.architectures import model_config, save_tiny
from dream_training.models.retriever import build_retriever, load_sentence_transformer
from dream_training.reading.document_store import DiskStore
from dream_training.reading.loading import all_heads, load_reader
from dream_training.reading.reader import Reader
from dream_training.trust import load_language_model
from helpers.bombs import Bomb
from helpers.own_process import in_own_process, run_command
from helpers.tiny import retriever_of

CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own-kind"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
class OwnModule:
    @classmethod
    def load(cls, *args, **kwargs):
        raise RuntimeError("loaded")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(model_config("meta-llama/Llama-3.2-1B"), path)


@pytest.fixture(scope="module")
def tiny_retriever(tiny: Path) -> Path:
    path = tiny.parent / "retriever"
    build_retriever(tiny, max_len=16).save_pretrained(str(path))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def model_with_code(tiny: Path, tmp_path: Path, trace: Path) -> Path:
    path = shutil.copytree(tiny, tmp_path / "model")
    (path / "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own-kind",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel",
                     "AutoModel": "own.OwnModel"},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = [
        {"query": f"q {i}", "target": "t", "documents": [f"a {i}", "b"], "positive": 0}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    (tmp_path / "beir" / "corpus.jsonl").write_text('{"_id": "d", "text": "d"}')
    (tmp_path / "beir" / "queries.jsonl").write_text('{"_id": "q", "text": "q"}')
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return tmp_path / "beir"


def config_for(path: Path) -> TrainConfig:
    return TrainConfig(reader=str(path), retriever=str(path), train_data="t", device="cpu")


def load_reader_of(path: Path) -> Reader:
    config = config_for(path)
    return load_reader(config.reader, config.lengths, config.run, {0: [0]})


LOADERS: dict[str, Callable[[Path], object]] = {
    "reader": lambda path: Reader.from_pretrained(path, {0: [0]}),
    "config's reader": load_reader_of,
    "heads": lambda path: all_heads(config_for(path).reader, config_for(path).run),
    "retriever": lambda path: build_retriever(path),
    "config's retriever": lambda path: retriever_of(config_for(path)),
    "plan": lambda path: model_config(str(path)),
    "sentence-transformers": load_sentence_transformer,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_model_with_code_is_refused_without_running_it(
    model_with_code: Path, trace: Path, load: Callable[[Path], object]
) -> None:
    with pytest.raises(ValueError, match=r"model brings code of its own; it is not run unless"):
        load(model_with_code)
    assert not trace.exists()


def run_its_code(path: Path) -> str:
    return type(load_language_model(path, trust_remote_code=True)).__name__


def test_it_is_run_when_that_is_allowed(model_with_code: Path, trace: Path) -> None:
    """In its own process: transformers registers what it has run."""
    assert in_own_process(run_its_code, model_with_code) == "OwnModel" and trace.exists()


def test_a_tokenizer_with_code_is_refused(tiny: Path, tmp_path: Path, trace: Path) -> None:
    path = shutil.copytree(tiny, tmp_path / "model")
    (path / "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer",
               "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="brings code of its own"):
        Reader.from_pretrained(path, {0: [0]})
    assert not trace.exists()


@pytest.mark.parametrize("name", ["own.OwnModule", "os.system", "sentence_transformers", 7, None])
def test_modules_of_other_packages_are_refused(
    tiny_retriever: Path, tmp_path: Path, trace: Path, name: object
) -> None:
    path = shutil.copytree(tiny_retriever, tmp_path / "model")
    (path / "own.py").write_text(CODE.format(trace=str(trace)))
    modules = json.loads((path / "modules.json").read_text())
    modules[-1]["type"] = name
    (path / "modules.json").write_text(json.dumps(modules))
    for load in (load_sentence_transformer, build_retriever):
        with pytest.raises(ValueError, match=r"modules\.json names .* not run unless you allow"):
            load(path)
    assert not trace.exists()


def test_a_kernel_of_the_hub_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attn_implementation": "who/knows"}))
    with pytest.raises(ValueError, match=r"asks for the attention kernel 'who/knows'"):
        Reader.from_pretrained(path, {0: [0]})


@pytest.mark.parametrize(
    "arguments",
    [
        "heads --reader {model} --data {data} --output {folder}/h.yaml",
        "evaluate {model} {beir} --no-bm25",
        "mine {data} --output {folder}/m.jsonl --retriever {model}",
        "data targets {bare} --output {folder}/t.jsonl --reader {model}",
        "train {config}",
        "doctor {config}",
    ],
    ids=lambda text: text.split()[0],
)
def test_every_command_refuses_and_says_how_to_allow(
    model_with_code: Path, trace: Path, data: Path, beir: Path, tmp_path: Path, arguments: str
) -> None:
    config, bare = tmp_path / "c.yaml", tmp_path / "bare.jsonl"
    bare.write_text('{"query": "q", "pos": ["a"]}\n')
    config.write_text(
        f"reader: {model_with_code}\nretriever: {model_with_code}\ntrain_data: {data}\n"
        f"device: cpu\noutput_dir: {tmp_path / 'run'}\n"
    )
    places = {"model": model_with_code, "data": data, "beir": beir, "bare": bare,
              "folder": tmp_path, "config": config}  # fmt: skip
    words = [word.format(**places) for word in arguments.split()]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ValueError), result.output
    assert "--trust-remote-code, or trust_remote_code: true in a config" in str(result.exception)
    assert not trace.exists()
    if words[0] not in ("train", "doctor"):
        helped = CliRunner().invoke(app, [*words[: 2 if words[0] == "data" else 1], "--help"])
        assert "--trust-remote-code" in helped.output


def pickled(path: Path, trace: Path, weights: str = "pytorch_model.bin") -> Bomb:
    """Put a bomb in place of the weights."""
    bomb = Bomb(trace)
    for file in path.glob("*.safetensors"):
        file.unlink()
    torch.save({"model.embed_tokens.weight": bomb}, path / weights)
    return bomb


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_pickled_weights_are_refused(
    tiny: Path, tmp_path: Path, trace: Path, load: Callable[[Path], object], weights: str
) -> None:
    path = shutil.copytree(tiny, tmp_path / "model")
    bomb = pickled(path, trace, weights)
    with pytest.raises(ValueError, match=rf"{weights} is a pickle, which is never read"):
        load(path)
    assert not bomb.went_off


def test_pickled_weights_of_a_module_are_refused(
    tiny_retriever: Path, tmp_path: Path, trace: Path
) -> None:
    path = shutil.copytree(tiny_retriever, tmp_path / "model")
    (path / "2_Dense").mkdir()
    bomb = pickled(path / "2_Dense", trace)
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model\.bin is a pickle"):
        load_sentence_transformer(path)
    assert not bomb.went_off


def test_the_libraries_refuse_what_is_not_found_beforehand(
    tiny: Path, tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a model of the hub, whose files are fetched while it is loaded."""
    path = shutil.copytree(tiny, tmp_path / "model")
    bomb = pickled(path, trace)
    monkeypatch.setattr("dream_training.trust.check_model_folder", lambda *a: None)
    for load in (LOADERS["reader"], LOADERS["retriever"], load_sentence_transformer):
        with pytest.raises(ValueError, match="has no weights in safetensors"):
            load(path)
    assert not bomb.went_off


def test_pickles_beside_good_weights_are_not_touched(
    tiny: Path, tiny_retriever: Path, tmp_path: Path, trace: Path
) -> None:
    """As a trainer leaves them in its checkpoints, and caches anywhere."""
    for source, load in ((tiny, LOADERS["reader"]), (tiny_retriever, load_sentence_transformer)):
        path = shutil.copytree(source, tmp_path / source.name)
        content = pickle.dumps(Bomb(trace))
        for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                     "training_args.bin", "vocab.pkl", "cache.pickle"):  # fmt: skip
            (path / name).write_bytes(content)
        load(path)
    assert not trace.exists()


def test_safetensors_that_are_pickles(tiny: Path, tmp_path: Path, trace: Path) -> None:
    path = shutil.copytree(tiny, tmp_path / "model")
    torch.save({"model.embed_tokens.weight": Bomb(trace)}, path / "model.safetensors")
    with pytest.raises(Exception, match=r"(?i)header"):
        Reader.from_pretrained(path, {0: [0]})
    assert not trace.exists()


def test_a_document_store_of_pickles(tmp_path: Path, trace: Path) -> None:
    store = DiskStore(tmp_path / "store", "model", 1 << 20)
    states = torch.ones(1, 2, 1, 3, 2)
    store.put([1], [2, 3, 4], states)
    (path,) = (tmp_path / "store").glob("*.safetensors")
    assert torch.equal(load_file(path)["states"], states)
    for write in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        write(Bomb(trace), path)
        assert DiskStore(tmp_path / "store", "model", 1 << 20).get([1], [2, 3, 4]) is None
        assert not path.exists() and not trace.exists()


def test_a_data_folder_of_pickles(tmp_path: Path, trace: Path) -> None:
    """Among them names that some versions of libraries read as pickles."""
    from dream_training.data.jsonl import iterate_training_rows

    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.pkl", "train.pickle", "dataset.arrow", "train.pt", "data.npy"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    (folder / "data.py").write_text(CODE.format(trace=str(trace)))
    with pytest.raises((ValueError, FileNotFoundError), match="data"):
        list(iterate_training_rows(folder))
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        list(iterate_training_rows(folder))
    assert not trace.exists()


def test_a_bomb_goes_off(trace: Path) -> None:
    """All of the above would pass with a bomb that never goes off."""
    path = trace.parent / "bomb.pkl"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    script = f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"
    run_command(sys.executable, "-c", script, check=True)
    assert trace.exists()
