"""The native extension; csrc/bindings.cpp checks every argument and raises ValueError."""

from collections.abc import Sequence

# Address, shape, strides in elements; address of the memory that holds it, and its size in bytes.
_Array = tuple[int, Sequence[int], Sequence[int], int, int]

max_head_dim: int

class Problem:
    def __init__(
        self,
        *,
        dtype: str,
        query: _Array,
        key: _Array,
        value: _Array,
        prefix_key: _Array | None,
        prefix_value: _Array | None,
        scores: _Array,
        spans: _Array,
        mask: _Array | None,
        positions: _Array | None,
        sinks: _Array | None,
        heads: _Array,
        mode: str,
        document_mass: float | None,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> None: ...

def forward(
    problem: Problem,
    *,
    output: _Array,
    state: _Array,
    segment_outputs: _Array | None,
    threads: int,
) -> None: ...
def backward(
    problem: Problem,
    *,
    state: _Array,
    output: _Array,
    grad_output: _Array,
    query: _Array | None,
    key: _Array | None,
    value: _Array | None,
    scores: _Array | None,
    prefix_key: _Array | None,
    prefix_value: _Array | None,
    sinks: _Array | None,
    threads: int,
) -> None: ...
def backward_of_scores(
    problem: Problem,
    *,
    state: _Array,
    segment_outputs: _Array,
    grad_output: _Array,
    scores: _Array,
    threads: int,
) -> None: ...
def document_mass(problem: Problem, *, mass: _Array, threads: int) -> None: ...
def instruction_set() -> str: ...
def take_peak_scratch_bytes() -> int: ...

# Compute capabilities that the CUDA kernels were compiled for, such as "80 90"; empty: for none.
cuda_architectures: str
# The version of nvcc.
cuda_compiler: str

def cuda_kernels() -> list[tuple[str, str, int, int]]: ...
def cuda_binary(part: str) -> bytes: ...
def cuda_readable(problem: Problem) -> bool: ...
def cuda_sizes(problem: Problem, splits: int) -> tuple[int, int, int]: ...
def cuda_forward(
    problem: Problem,
    *,
    output: _Array,
    state: _Array,
    plan: _Array,
    partial: _Array | None,
    splits: int,
    stream: int | None,
) -> None: ...
def cuda_backward(
    problem: Problem,
    *,
    state: _Array,
    plan: _Array,
    memory: _Array,
    output: _Array,
    grad_output: _Array,
    query: _Array | None,
    key: _Array | None,
    value: _Array | None,
    scores: _Array | None,
    prefix_key: _Array | None,
    prefix_value: _Array | None,
    splits: int,
    stream: int | None,
) -> None: ...
def cuda_masses(problem: Problem, *, state: _Array, plan: _Array, stream: int | None) -> None: ...
def emulator_settings(*, backwards: bool, file: str, line: int) -> None: ...
def emulator_take_barriers() -> list[tuple[str, int]]: ...
