"""The commands of the benchmark suite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dream_training.console import make_console, show_on

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Time every peer, record and plot it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 for PyTorch's own number")]
Quick = Annotated[bool, typer.Option("--quick", help="small shapes, done in minutes")]
Output = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(help="folder of the records; by default that of the checkout"),
]
Peers = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--peer", help="only peers whose name begins so; may be repeated"),
]

Runs = Annotated[int, typer.Option(min=1, help="timed rounds")]
Seconds = Annotated[float, typer.Option(help="a peer's or way's time for one case")]
TotalSeconds = Annotated[float, typer.Option(help="the time of all")]
Memory = Annotated[bool, typer.Option(help="measure peak memory")]


def results_folder(output: Path | None, quick: bool) -> Path:
    """The folder of the records: a quick run never overwrites a result."""
    from dream_kernels.files import is_stream

    if output is not None:
        if is_stream(output):
            raise ValueError(f"--output must be a folder, got {output}")
        return output
    here = Path(__file__).resolve().parent
    # In an installed package there is no checkout to write into.
    folder = here if (here.parent / "setup.py").is_file() else Path.cwd() / "dream-benchmarks"
    return folder / "results" / ("quick" if quick else "")


def _device(name: str, threads: int) -> torch.device:
    import torch

    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@app.callback()
def _benchmarks() -> None:
    """Keeps the commands named even if there is only one."""


@app.command()
def kernel(
    device: Device = "auto",
    threads: Threads = 0,
    quick: Quick = False,
    output: Output = None,
    peer: Peers = None,
    case: Annotated[str, typer.Option(help="only cases whose name contains this")] = "",
    dtype: Annotated[str, typer.Option(help="only this dtype")] = "",
    runs: Runs = 15,
    seconds: Seconds = 6.0,
    total_seconds: TotalSeconds = 1200.0,
    memory: Memory = True,
) -> None:
    """Time one call of the operator, forward and backward, against its peers."""
    from . import cases as shapes
    from . import records
    from .kernel import Settings, choose_peers, run_kernel
    from .overhead import run_overhead
    from .tables import print_kernel, print_overhead

    chosen = _device(device, threads)
    settings = Settings(
        device=chosen, peers=choose_peers(peer), runs=runs, seconds=seconds,
        total_seconds=total_seconds, memory=memory, quick=quick,
    )  # fmt: skip
    if quick:
        wanted = shapes.quick_cases()
        settings.runs, settings.seconds = min(runs, 5), 2.0
        if peer is None and settings.device.type == "cpu":
            settings.peers = [name for name in settings.peers if name != "flex_attention"]
    else:
        wanted = shapes.gpu_cases() if settings.device.type == "cuda" else shapes.cpu_cases()
    wanted = [c for c in wanted if case in c.name and dtype in c.dtype]
    if not wanted:
        raise ValueError(f"no case has {case!r} in its name and dtype {dtype!r}")
    console = show_on(make_console())
    said: set[str] = set()
    keeper = records.Keeper(
        results_folder(output, quick), "kernel", part=bool(case or dtype or peer)
    )

    console.print(f"timing {len(wanted)} cases; each is shown when it is done", style="dim")

    def show(own: list[dict[str, Any]]) -> None:
        print_kernel(console, own, said)
        keeper.add(own)

    run_kernel(wanted, settings, show, "kernel")
    overhead = run_overhead(settings)
    print_overhead(console, overhead)
    console.print(f"\n{keeper.add(overhead)}", soft_wrap=True)


@app.command()
def scaling(
    device: Device = "auto",
    threads: Threads = 0,
    quick: Quick = False,
    output: Output = None,
    peer: Peers = None,
    axis: Annotated[str, typer.Option(help="only this axis")] = "",
    runs: Runs = 7,
    seconds: Seconds = 4.0,
    total_seconds: TotalSeconds = 1200.0,
    memory: Memory = True,
) -> None:
    """Time the operator against prefix length, documents, batch and heads scored."""
    from . import records
    from .kernel import Settings, choose_peers
    from .scaling import PEERS, default_axes, run_scaling
    from .tables import print_scaling

    settings = Settings(
        device=_device(device, threads), peers=choose_peers(peer or PEERS),
        runs=3 if quick else runs, seconds=1.0 if quick else seconds, total_seconds=total_seconds,
        memory=memory and not quick, quick=quick,
    )  # fmt: skip
    wanted = [a for a in default_axes(settings) if axis in a.name]
    if not wanted:
        raise ValueError(f"no axis is called {axis!r}")
    console = show_on(make_console())
    keeper = records.Keeper(results_folder(output, quick), "scaling", part=bool(axis or peer))

    console.print(f"timing along {len(wanted)} axes; each is shown when it is done", style="dim")

    def show(name: str, own: list[dict[str, Any]]) -> None:
        print_scaling(console, name, own)
        keeper.add(own)

    run_scaling(wanted, settings, show)
    console.print(f"\n{keeper.path}", soft_wrap=True)


@app.command()
def step(
    device: Device = "auto",
    threads: Threads = 0,
    quick: Quick = False,
    output: Output = None,
    model: Annotated[str, typer.Option(help="one of the suite's models; by the device")] = "",
    way: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="only ways whose name contains this; may be repeated"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="queries, and documents of the pool")] = 16,
    document_tokens: Annotated[int, typer.Option(min=1)] = 64,
    runs: Runs = 4,
    seconds: Seconds = 20.0,
    total_seconds: TotalSeconds = 600.0,
    memory: Memory = True,
) -> None:
    """Time one whole training step, and what teaching costs: a pair, and a step without a reader.

    The way "teaching" stands for the latter: --way teaching times it alone.
    """
    from . import records
    from .step import StepSettings, run_steps
    from .step_models import STEP_MODELS
    from .tables import print_steps, print_teaching
    from .teaching import TeachingSettings, run_teaching

    chosen = _device(device, threads)
    shaped = [name for name in STEP_MODELS if name.endswith("shaped")]
    models = [model] if model else shaped if chosen.type == "cuda" else ["smollm2-135m"]
    if quick:
        models, batch, document_tokens, runs = [model or "tiny"], min(batch, 4), 24, 3
        memory = False  # a process for each way would take most of the time
    unknown = set(models) - STEP_MODELS.keys()
    if unknown:
        raise ValueError(f"model must be one of {', '.join(STEP_MODELS)}, got {unknown.pop()!r}")
    console = show_on(make_console())
    keeper = records.Keeper(results_folder(output, quick), "step", part=bool(model or way))
    for name in models:
        settings = StepSettings(
            model=name, device=chosen, batch=batch, document_tokens=document_tokens, runs=runs,
            seconds=seconds, total_seconds=total_seconds, ways=way or (), memory=memory,
            quick=quick,
        )  # fmt: skip

        def say(text: str) -> None:
            console.print(text, style="dim")

        if settings.chosen_ways():
            print_steps(console, run_steps(settings, say, keeper.replace_last))
            keeper.add([])
        if way is None or any(part in "teaching" for part in way):
            costs = TeachingSettings(
                model=name, device=chosen, batch=batch, pair_documents=16 if not quick else 4,
                step_documents=2 * batch, document_tokens=document_tokens, runs=runs,
                seconds=seconds, quick=quick,
            )  # fmt: skip
            own = run_teaching(costs, say)
            print_teaching(console, own)
            keeper.add(own)
    console.print(f"\n{keeper.path}", soft_wrap=True)


@app.command("all")
def everything(
    device: Device = "auto", threads: Threads = 0, quick: Quick = False, output: Output = None
) -> None:
    """Run kernel, scaling and step one after the other, and report; --quick takes minutes."""
    kernel(device=device, threads=threads, quick=quick, output=output)
    scaling(device=device, threads=threads, quick=quick, output=output)
    step(device=device, threads=threads, quick=quick, output=output)
    folder = results_folder(output, quick)
    report(output=folder)


@app.command("gpu-acceptance")
def gpu_acceptance(
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="tiny shapes on the CPU, to try the command out")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="of all stages together")] = 25.0,
    stage: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="only this stage; may be repeated"),
    ] = None,
    cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder that compile-ahead filled", exists=True, file_okay=False),
    ] = None,
    output: Output = None,
    runs: Runs = 25,
    seconds: Seconds = 4.0,
) -> None:
    """Check the kernels on the GPU, time them and what surrounds them, the most telling first.

    Each stage is stopped at its limit, and one that no longer fits is left out by name.
    """
    from . import records
    from .acceptance import (
        chosen_stages,
        measured_floors,
        require_gpu,
        run_acceptance,
        summary,
    )
    from .environment import provenance
    from .stages import SUITE, Order
    from .tables import print_rows

    stages = chosen_stages(stage or ())
    if not rehearse:
        require_gpu()
    folder = results_folder(output, rehearse)
    order = Order(str(folder), rehearse, 0.0, runs, seconds)
    console = show_on(make_console())
    path = folder / records.file_name(SUITE, provenance(order.device))
    run_acceptance(
        stages, order, minutes=minutes, cache=cache,
        say=lambda text: console.print(text, style="dim"),
    )  # fmt: skip
    results = records.read_file(path)
    floors_here = None if rehearse else measured_floors(results)
    if floors_here is not None:
        console.print(f"\n{floors_here}")
    console.print(f"\n{path}\n", soft_wrap=True)
    print_rows(console, ["to be reached", "bound", "measured", "met"], summary(results))


@app.command("compile-ahead")
def compile_ahead(
    cache: Annotated[Path, typer.Option(help="folder to fill, the later TRITON_CACHE_DIR")],
    arch: Annotated[str, typer.Option(help="architecture of the GPU")] = "sm_90",
    processes: Annotated[int, typer.Option(min=1, help="that compile")] = 1,
) -> None:
    """Compile the kernels of gpu-acceptance on a machine without a GPU, for one that has it.

    Both need the same version of Triton and the same checkout.
    """
    from .compile_ahead import acceptance_cases, compile_cases

    count, seconds = compile_cases(arch, cache, acceptance_cases(), processes)
    typer.echo(f"{cache}: {count} kernels for {arch}, {seconds:.0f} s")


@app.command()
def report(output: Output = None) -> None:
    """Turn the records into plots and a page of tables, README.md beside them."""
    from .report import write_page

    for path in write_page(results_folder(output, quick=False)):
        typer.echo(path)


@app.command()
def pictures(
    output: Output = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of the pictures; by default docs/images of the checkout"),
    ] = None,
    demo: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of a dream demo on this machine, to be recorded first"),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="whose records are drawn, by name; by default the newest"),
    ] = None,
) -> None:
    """Draw the README's pictures from the records, for light and dark pages."""
    from .pictures import draw_pictures, record_demo

    folder = results_folder(output, quick=False)
    if demo is not None:
        typer.echo(record_demo(demo, folder))
    default = _IMAGES if output is None else folder / "images"
    for path in draw_pictures(folder, images or default, device):
        typer.echo(path)


@app.command()
def floors() -> None:
    """Print the least times that an H100 needs for the acceptance shapes."""
    from .floors import H100, floor_table

    typer.echo(floor_table(H100))


@app.command()
def predict(
    resources: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="table of compiled kernels; by default the checkout's"),
    ] = None,
) -> None:
    """Predict an H100's times from the compiled kernels, and the error of such predictions."""
    from .cases import gpu_cases
    from .predict import RESOURCES, Resources, case_table, published_table
    from .tables import print_rows

    checkout = Path(__file__).resolve().parent.parent
    table = Resources(resources or checkout / RESOURCES)
    console = show_on(make_console())
    print_rows(console, *published_table(table))
    console.print()
    pools = [case for case in gpu_cases() if case.prefix and case.shared and not case.padding]
    print_rows(console, *case_table(table, pools))


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="revision to compare this checkout with")],
    device: Device = "auto",
    threads: Threads = 0,
    quick: Quick = False,
    output: Output = None,
    rounds: Annotated[int, typer.Option(min=1, help="processes for each revision")] = 3,
) -> None:
    """Time two commits on this machine, alternating."""
    from . import records
    from .compare import compare_revisions, default_cases
    from .tables import print_compare

    chosen = _device(device, threads)
    console = show_on(make_console())
    results = compare_revisions(
        base, default_cases(chosen, quick), chosen, rounds,
        lambda text: console.print(text, style="dim"),
    )  # fmt: skip
    print_compare(console, results)
    name = records.file_name("compare", results[0]["environment"])
    path = records.write(results_folder(output, quick) / name, results)
    console.print(f"\n{path}", soft_wrap=True)


def main() -> None:
    """Run a command; user errors end in one line."""
    import sys

    try:
        app()
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"benchmarks: {error}")
