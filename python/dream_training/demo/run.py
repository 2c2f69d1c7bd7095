"""``dream demo``: a retriever from nothing, and a trained one adapted, on docstrings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dream_kernels import read_heads
from dream_kernels.files import is_stream
from dream_training.console import make_console, show_on, shows_progress
from dream_training.data.beir_folder import write_beir_folder
from dream_training.demo import printing
from dream_training.demo.docstrings import DEFAULT_PACKAGES, load_documentation
from dream_training.demo.parts import DATA, Setup, adapt_trained, train_from_nothing
from dream_training.demo.results import ADAPTED, Results
from dream_training.json_file import read_json, write_json
from dream_training.known_models import PACKAGED_RETRIEVER
from dream_training.models.loading import check_model, resolve_model
from dream_training.training.output_folder import CONFIG, results_in

_PACKAGES = ("torch", "transformers", "sentence-transformers", "peft")


@shows_progress
def run_demo(
    output_dir: Path,
    *,
    part: int | None = None,
    reader: str = "smollm2",
    trained: str = PACKAGED_RETRIEVER,
    steps: int = 80,
    seed: int = 0,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    test_size: int = 500,
    corpus_size: int = 1100,
) -> dict[str, Any]:
    """Train on documentation without relevance labels, and show how much retrievers improve.

    Part 1 trains a retriever from nothing: the first layers of the reader's own backbone. Part 2
    adapts a trained retriever to these documents. The reader reads every batch once for both.

    Writes to ``output_dir``: ``metrics.json``, ``curve.png``, ``heads.yaml``, ``heads.png``, the
    retriever of part 1, ``adapted/`` with that of part 2, and ``beir/``, the data as a BEIR folder.

    Args:
        output_dir: where everything goes.
        part: 1 or 2 for one part alone; None for both, or for the first if ``trained`` is the
            packaged one and not installed.
        reader: folder or hub name of the frozen language model; ``smollm2`` is the packaged one.
        trained: folder or hub name of the retriever of part 2; ``minilm`` is the packaged one.
        steps: training steps of each part; the reader reads half as many batches.
        seed: of weights, data order and head selection.
        packages: the packages whose documentation is the data.
        test_size: number of test queries.
        corpus_size: number of documents that they are searched in.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: there is no such part, or ``output_dir`` is not a folder.
        FileNotFoundError: there is no such model.
        FileExistsError: ``output_dir`` has results of another run than the demo's.
        ModuleNotFoundError: a packaged model that is needed is not installed; the message names
            the command that installs it.
    """
    if part not in (None, 1, 2):
        raise ValueError(f"part must be 1 or 2, or None for both, got {part!r}")
    _check_folder(output_dir)
    for name, what in ((reader, "reader"), (trained, "retriever")):
        check_model(name, what)
    begin = time.perf_counter()
    console = show_on(make_console())
    missing = _why_missing(trained) if part != 1 else None
    if missing is not None and part == 2:
        raise ModuleNotFoundError(missing)
    parts = {1, 2} if part is None else {part}
    if missing is not None:
        parts.discard(2)
        printing.print_left_out(console, missing)

    console.rule("data")
    data = load_documentation(packages, seed=seed, test_size=test_size, corpus_size=corpus_size)
    printing.print_data(console, data)
    write_beir_folder(
        output_dir / "beir",
        data.corpus,
        {"test": data.test, "repeats": data.repeats},
        train=data.train,
    )
    setup = Setup.of(data, reader, steps, seed, console)
    first = second = None
    if 1 in parts:
        console.rule("part 1: from nothing, without relevance labels")
        first = train_from_nothing(setup, output_dir)
    if 2 in parts:
        console.rule(f"part 2: {_name(trained)}, adapted without relevance labels")
        heads = None if first is None else read_heads(output_dir / "heads.yaml")
        second = adapt_trained(setup, output_dir / ADAPTED, trained, heads)

    results = Results(setup, _name(trained), first, second)
    metrics = {
        **results.metrics(),
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": printing.describe_versions(data, _PACKAGES),
    }
    write_json(output_dir / "metrics.json", metrics)
    results.draw(output_dir / "curve.png")
    printing.print_results(console, results, metrics)
    printing.print_files(console, results.files(output_dir), metrics, missing)
    return metrics


def _check_folder(output_dir: Path) -> None:
    """Raise unless the demo may replace what is there: an earlier demo."""
    if is_stream(output_dir):
        raise ValueError(f"--output-dir must be a folder, got {output_dir}")
    for folder in (output_dir, output_dir / ADAPTED):
        config = folder / CONFIG
        if results_in(folder) and config.is_file() and read_json(config).get("train_data") != DATA:
            raise FileExistsError(
                f"{folder} has results of another run than the demo's: choose another --output-dir"
            )


def _why_missing(trained: str) -> str | None:
    """Why the retriever of part 2 is missing, with the command that installs it."""
    try:
        resolve_model(trained, what="retriever")
    except ModuleNotFoundError as error:
        return str(error)
    return None


def _name(trained: str) -> str:
    return "MiniLM" if trained == PACKAGED_RETRIEVER else Path(trained).name
