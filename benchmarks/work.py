"""Operations and bytes of one case, counted by hand.

Per visible (row, key) pair and head a product over the head size costs ``2 D`` operations. The
forward has two (logits, values). The backward recomputes the logits and ``dO . v``, and has one for
the queries' gradient, and one each for the gradients of keys and values, over local pairs only when
a prefix is frozen. Every tensor is moved once: a shared prefix once for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cases import DTYPES, Case


@dataclass(frozen=True)
class Work:
    """Of one forward or one backward.

    Attributes:
        operations: multiplications and additions of the matrix products.
        bytes: read and written.
        exponentials: one a pair, of the softmax.
    """

    operations: int
    bytes: int
    exponentials: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operations + other.operations,
            self.bytes + other.bytes,
            self.exponentials + other.exponentials,
        )


def forward_work(case: Case) -> Work:
    """Of the forward."""
    size = DTYPES[case.dtype].itemsize
    moved = size * (2 * _rows(case) + 2 * _keys(case)) + _state(case)
    return Work(4 * case.head_dim * case.pairs, moved, case.pairs)


def backward_work(case: Case) -> Work:
    """Of the gradients that the case asks for."""
    if not case.gradients:
        return Work(0, 0, 0)
    size = DTYPES[case.dtype].itemsize
    products = 2 * case.pairs
    local_pairs = case.pairs if not case.prefix else _local_pairs(case)
    written = 0
    if "query" in case.gradients:
        products += case.pairs
        written += _rows(case)
    for name in ("key", "value"):
        if name in case.gradients:
            products += local_pairs
            written += case.batch * case.key_heads * case.local * case.head_dim
    # Query, output gradient and output are read.
    moved = size * (3 * _rows(case) + 2 * _keys(case) + written) + _state(case)
    return Work(2 * case.head_dim * products, moved, case.pairs)


def total_work(case: Case) -> Work:
    """Of forward and backward."""
    return forward_work(case) + backward_work(case)


def allowed_extra_bytes(case: Case, threads: int) -> int:
    """What the CPU kernel may allocate: 16 bytes a (row, head, document), 1 MiB a thread."""
    per_row = 16 * case.batch * case.query_heads * case.rows * case.documents
    return per_row + threads * 2**20


def _rows(case: Case) -> int:
    return case.batch * case.query_heads * case.rows * case.head_dim


def _keys(case: Case) -> int:
    """Elements of all distinct keys."""
    prefixes = 1 if case.shared else case.batch
    return case.key_heads * case.head_dim * (prefixes * case.prefix + case.batch * case.local)


def _state(case: Case) -> int:
    """Bytes of the log-sum-exps in float32, one a row, head and segment."""
    return 4 * case.batch * case.query_heads * case.rows * (case.documents + 1)


def _local_pairs(case: Case) -> int:
    outside = case.batch * case.query_heads * case.rows * case.prefix
    return case.pairs - outside
