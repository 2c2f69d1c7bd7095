"""BEIR's published sets, downloaded once by ``beir`` and kept as BEIR folders."""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path

from dream_kernels.files import whole_folder
from dream_training.console import progress
from dream_training.data.beir_folder import is_beir_folder

_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{name}.zip"
NAMES = (
    "msmarco", "trec-covid", "nfcorpus", "nq", "hotpotqa", "fiqa", "arguana", "webis-touche2020",
    "cqadupstack", "quora", "dbpedia-entity", "scidocs", "fever", "climate-fever", "scifact",
)  # fmt: skip


def check_name(name: str) -> None:
    """Raise ValueError unless BEIR publishes a set of that name."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(NAMES)}"
        raise ValueError(f"beir:{name}: BEIR has no such set{hint}")


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """Return the folder of a set, downloaded by ``beir`` if it is not in the cache.

    ``beir`` takes an error page for an archive, and the remains of an interrupted download or
    extraction for a complete one. So it works in a temporary folder here, which is renamed when the
    set is complete.

    Args:
        name: as in BEIR's table, such as ``scifact``.
        cache_dir: where sets are kept; ``beir`` in
            :func:`~dream_training.models.cache.cache_root` by default.

    Raises:
        FileNotFoundError: the set could not be fetched.
        OSError: the cache cannot be written.
        ValueError: BEIR has no such set.
    """
    from beir import util

    from dream_training.models.cache import cache_root, make_cache

    check_name(name)
    cache = cache_dir or cache_root() / "beir"
    folder = cache / name
    if is_beir_folder(folder):
        return folder
    url = _URL.format(name=name)
    make_cache(cache, "--cache-dir or DREAM_CACHE")
    try:
        with (
            progress(f"fetching {name}"),
            whole_folder(folder, replace=False) as content,
            tempfile.TemporaryDirectory(dir=content.parent) as unpacked,
        ):
            fetched = Path(util.download_and_unzip(url, unpacked))
            if not is_beir_folder(fetched):
                raise ValueError("the archive holds no corpus.jsonl")
            content.rmdir()
            fetched.rename(content)
    except Exception as error:  # requests, zipfile and the file system each have their own
        raise FileNotFoundError(
            f"task 'beir:{name}': {url} could not be fetched: {type(error).__name__}: {error}; "
            f"a copy may be put at {folder}"
        ) from error
    return folder
