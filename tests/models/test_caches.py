"""If HOME cannot be written, a run continues if it can, or names what to set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dream_training import startup
from dream_training.evaluation import beir_sets
from dream_training.models import cache, smollm2


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A file: no user, not even root, can make a folder in it."""
    path = tmp_path / "home"
    path.touch()
    # Its own context ends before the check that a test leaves the process unchanged.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DREAM_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, "x")  # so that its value is restored
            patch.delenv(name)
        patch.setenv("HOME", str(path))
        yield path


def test_the_cache_of_the_packaged_model_is_named(home: Path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: (home / "model.gguf", "1"))
    monkeypatch.setattr(cache, "faster_cpu_dtype", lambda: "float32")
    assert cache.fastest_dtype(cache.cache_root()) in ("float32", "bfloat16"), "continues"
    message = f"the cache {home}/.cache/dream-kernels cannot be written: .*; set DREAM_CACHE to a"
    with pytest.raises(OSError, match=message):
        smollm2.smollm2_path("auto")


def test_the_cache_of_the_sets_of_beir_is_named(home: Path) -> None:
    pytest.importorskip("beir", reason="beir is not installed")
    message = f"the cache {home}/.cache/dream-kernels/beir cannot .* set --cache-dir or DREAM_CACHE"
    with pytest.raises(OSError, match=message):
        beir_sets.fetch("scifact")


def test_data_sets_get_a_temporary_cache(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    left = []
    monkeypatch.setattr(startup.atexit, "register", lambda *call, **options: left.append(call[1]))
    startup.find_datasets_cache()
    folder = os.environ["HF_DATASETS_CACHE"]
    assert left == [folder] and os.access(folder, os.W_OK)
    os.rmdir(folder)
    text = capsys.readouterr().err
    assert f"{home}/.cache/huggingface/datasets cannot be written" in text
    assert "set HF_DATASETS_CACHE" in text and text.count("\n") == 1
    # What the user set stays, and so does a cache that can be written.
    startup.find_datasets_cache()
    assert os.environ["HF_DATASETS_CACHE"] == folder
    del os.environ["HF_DATASETS_CACHE"]
    os.environ["HF_HOME"] = str(tmp_path / "new" / "folder")
    startup.find_datasets_cache()
    assert "HF_DATASETS_CACHE" not in os.environ and not capsys.readouterr().err
