"""What a call may add to attention: a window, a soft cap, sinks.

An argument that a call does not have is None, and nothing is compiled for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(b_x):
    """Without cancellation near 0, where its series is exact in float32."""
    b_e = tl.exp2(tl.abs(b_x) * (-2 * LOG2_E))
    b_large = (1.0 - b_e) / (1.0 + b_e)
    b_square = b_x * b_x
    b_series = b_square * (2 / 15 + b_square * (-17 / 315 + b_square * (62 / 2835)))
    b_small = b_x * (1.0 + b_square * (-1 / 3 + b_series))
    return tl.where(b_square < 0.0625, b_small, tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def products(b_rows, b_columns, cap, IP: tl.constexpr):
    """Dot products of two tiles' rows, which ``scale`` makes logits; with a soft cap their tanh.

    Args:
        cap: factor of the dot products inside the tanh, or None.
    """
    b_s = tl.dot(b_rows, tl.trans(b_columns), input_precision=IP)
    if cap is not None:
        b_s = tanh(b_s * cap)
    return b_s


@triton.jit
def through_cap(b_ds, b_s, cap):
    """The gradient in the logits before the soft cap, from ``b_s`` of :func:`products`."""
    if cap is not None:
        b_ds = b_ds * (1.0 - b_s * b_s)
    return b_ds


@triton.jit
def far_positions(window, positions, o_b, b_pos, m_rows, T):
    """``[BM]`` the last position before each row's window: the row sees later ones only.

    Args:
        positions: ``[B, T]`` of every key, or None where the keys count up from 0.
        b_pos: ``[BM]`` the place of each row.
    """
    if positions is None:
        return b_pos - window
    else:
        p_own = positions + o_b.to(tl.int64) * T + tl.maximum(b_pos, 0)
        return tl.load(p_own, mask=m_rows, other=0) - window


@triton.jit
def near_keys(b_far, positions, i_z, T, b_n, m_n):
    """``[BM, BN]``: whether the keys ``b_n`` of batch element ``i_z`` are in the rows' windows."""
    b_at = b_n
    if positions is not None:
        b_at = tl.load(positions + i_z * T + b_n, mask=m_n, other=0)
    return b_at[None, :] > b_far[:, None]


@triton.jit
def first_near(b_far, m_rows, T):
    """The first key in the window of any row, where the keys count up from 0."""
    return tl.maximum(tl.min(tl.where(m_rows, b_far, T), 0) + 1, 0)
