"""Building blocks that the kernels share: rows, key tiles, the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

# Flags of a tile in the plan: it opens a document, it closes one.
FIRST = tl.constexpr(1)
LAST = tl.constexpr(2)
# Entries of the plan's counts, per batch element.
N_TILES = tl.constexpr(0)
N_SHORT = tl.constexpr(1)
N_REST = tl.constexpr(2)
FIRST_ROW = tl.constexpr(3)
COUNTS = tl.constexpr(4)
# Columns of the per-row coefficients.
NORM = tl.constexpr(0)
FACTOR = tl.constexpr(1)
OFFSET = tl.constexpr(2)
MU = tl.constexpr(3)
COLUMNS = tl.constexpr(4)


@triton.jit
def locate_rows(i_m, i_h, table, M, G, BM: tl.constexpr):
    """Rows ``i_m * BM ...`` of a key head: its query heads, scored ones first, times ``M`` rows.

    Returns:
        ``[BM]`` each: validity, rank of the head in the group, query head, row in ``0 .. M - 1``.
    """
    o_r = i_m * BM + tl.arange(0, BM)
    m_r = o_r < G * M
    o_g = tl.where(m_r, o_r // M, 0)
    o_m = o_r % M
    o_h = tl.load(table + i_h * G + o_g)
    return m_r, o_g, o_h, o_m


@triton.jit
def row_pointers(base, i_b, o_h, o_m, s_b, s_h, s_m):
    """``[BM]`` pointers to rows of a ``[B, Hq, M, D]`` tensor with any strides."""
    return base + (i_b.to(tl.int64) * s_b + o_h.to(tl.int64) * s_h + o_m.to(tl.int64) * s_m)


@triton.jit
def load_rows(p_rows, m_rows, s_d, D: tl.constexpr, BD: tl.constexpr):
    """``[rows, BD]``: whole rows, zero where masked and beyond ``D``."""
    o_d = tl.arange(0, BD)
    m_d = m_rows[:, None] if D == BD else m_rows[:, None] & (o_d < D)[None, :]
    return tl.load(p_rows[:, None] + o_d[None, :] * s_d, mask=m_d, other=0.0)


@triton.jit
def store_rows(p_rows, b_x, m_rows, D: tl.constexpr, BD: tl.constexpr):
    """Write ``[rows, BD]`` to rows that are contiguous."""
    o_d = tl.arange(0, BD)
    m_d = m_rows[:, None] if D == BD else m_rows[:, None] & (o_d < D)[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], b_x.to(p_rows.dtype.element_ty), mask=m_d)


@triton.jit
def split_range(n_work, i_s, S):
    """The tiles of split ``i_s`` out of ``S``."""
    begin = (n_work * i_s.to(tl.int64) // S).to(tl.int32)
    return begin, (n_work * (i_s + 1).to(tl.int64) // S).to(tl.int32)


@triton.jit
def tile_pointers(
    local, prefix, s_n, s_pn, key0, P, BN: tl.constexpr, HAS_PREFIX: tl.constexpr
):  # fmt: skip
    """``[BN]`` pointers to the rows of a tile that lies wholly in the prefix or behind it.

    ``local`` and ``prefix`` are based so that positions count from the start of the prefix.
    """
    pos = key0.to(tl.int64) + tl.arange(0, BN)
    if HAS_PREFIX:
        inside = key0 < P
        return tl.where(inside, prefix, local) + pos * tl.where(inside, s_pn, s_n)
    else:
        return local + pos * s_n


@triton.jit
def gather_pointers(local, prefix, s_n, s_pn, pos, P, HAS_PREFIX: tl.constexpr):
    """``[BN]`` pointers to the rows at any positions ``pos`` ``[BN]``."""
    o_n = pos.to(tl.int64)
    if HAS_PREFIX:
        return tl.where(pos < P, prefix + o_n * s_pn, local + o_n * s_n)
    else:
        return local + o_n * s_n


@triton.jit
def finite(b_m):
    """A peak to subtract: 0 in place of the ``-inf`` of a row that has seen no key."""
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def inverse(b_l):
    """``1 / l``, and 0 for the sum over no key."""
    return tl.where(b_l > 0, 1.0 / tl.where(b_l > 0, b_l, 1.0), 0.0)


@triton.jit
def log_add(b_m, b_l, b_lse):
    """Add ``exp2(lse)`` to the sum that a peak and a relative sum stand for."""
    b_new = tl.maximum(b_m, b_lse)
    b_safe = finite(b_new)
    return b_new, b_l * tl.exp2(b_m - b_safe) + tl.exp2(b_lse - b_safe)


@triton.jit
def online_step(b_s, b_v, b_m, b_l, b_acc, b_bias, scale, IP: tl.constexpr):
    """One tile of the online softmax, in powers of two.

    Args:
        b_s: ``[BM, BN]`` raw dot products, ``-inf`` for keys that the row does not see.
        b_v: ``[BN, BD]``.
        b_m: ``[BM]`` peak so far.
        b_l: ``[BM]`` sum relative to the peak.
        b_acc: ``[BM, BD]`` weighted sum of values relative to the peak.
        b_bias: ``[BM]`` added to every logit of the tile.
        scale: positive factor of the dot products, ``log2(e)`` included.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale + b_bias)
    b_safe = finite(b_new)
    b_p = tl.exp2(b_s * scale - (b_safe - b_bias)[:, None])  # [BM, BN]
    b_alpha = tl.exp2(b_m - b_safe)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=IP)
    return b_new, b_l, b_acc
