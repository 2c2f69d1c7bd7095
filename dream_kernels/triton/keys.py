"""The gradients of keys and values: one program per key tile, its rows in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COLUMNS,
    COUNTS,
    FACTOR,
    FIRST_ROW,
    MU,
    NORM,
    OFFSET,
    in_units,
    load_rows,
    row_pointers,
    store_rows,
)
from dream_kernels.triton.options import far_positions, products, through_cap


@triton.jit(do_not_specialize=["window", "M", "T", "C", "Hq", "B", "first_key", "n_keys"])
def keys_kernel(
    q, k, v, do, mask, positions, scored, segment, counts, weights, state, columns, documents, dk,
    dv, s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd,
    s_ob, s_oh, s_om, s_od,
    scale, dk_scale, window, cap, B, Hq, G, M, T, C, first_key, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    NEGATE: tl.constexpr, SHARED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    IP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` of one segment of memory, prefix or local, which begins at ``first_key``.

    Grid ``(tiles, Hkv, B)``; with ``SHARED``, a prefix of the whole batch, ``(tiles, Hkv, 1)``
    and each program loops over the batch.
    """
    i_n, i_h, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIT > 1:
        s_qb, s_qh, s_qm = in_units(s_qb, s_qh, s_qm, UNIT)
        s_kb, s_kh, s_kn = in_units(s_kb, s_kh, s_kn, UNIT)
        s_vb, s_vh, s_vn = in_units(s_vb, s_vh, s_vn, UNIT)
        s_ob, s_oh, s_om = in_units(s_ob, s_oh, s_om, UNIT)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < n_keys
    o_k = o_n.to(tl.int64)
    i_kh = i_h.to(tl.int64)
    p_k = k + (i_z.to(tl.int64) * s_kb + i_kh * s_kh) + o_k * s_kn
    p_v = v + (i_z.to(tl.int64) * s_vb + i_kh * s_vh) + o_k * s_vn
    b_k = load_rows(p_k, m_n, s_kd, D, BD)
    b_v = load_rows(p_v, m_n, s_vd, D, BD)
    b_pos = first_key + o_n
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    begin, end = i_z, i_z + 1
    if SHARED:
        begin, end = i_z * 0, i_z * 0 + B
    for z in range(begin, end):
        i_b = begin * 0 + z
        b_segment = tl.load(segment + i_b.to(tl.int64) * T + b_pos, mask=m_n, other=-1)
        one = tl.max(b_segment, 0)
        b_segment = tl.where(m_n, b_segment, one)
        m_seen = m_n
        if HAS_MASK:
            m_seen = tl.load(mask + i_b.to(tl.int64) * T + b_pos, mask=m_n, other=0) != 0
        b_place = b_pos
        if positions is not None:
            b_place = tl.load(positions + i_b.to(tl.int64) * T + b_pos, mask=m_n, other=0)
        # A tile inside one segment needs one set of coefficients per row, others one per key. Two
        # loops, of which one is empty: in the arms of a branch the compiler would join the waits
        # after them, and so make each product wait.
        uniform = (tl.min(b_segment, 0) == one).to(tl.int32)
        b_dk, b_dv = _add_rows(
            q, do, scored, counts, weights, state, columns, documents,
            s_qb, s_qh, s_qm, s_qd, s_ob, s_oh, s_om, s_od,
            b_k, b_v, b_dk, b_dv, b_pos, b_place, m_seen, tl.zeros([1], tl.int32) + one, uniform,
            i_b, i_h, first_key + i_n * BN, scale, window, positions, cap, Hq, G, M, T, C,
            D, BD, BM, BN, PER_HEAD, BIAS, CAUSAL, NEGATE, DK, DV, IP,
        )  # fmt: skip
        b_dk, b_dv = _add_rows(
            q, do, scored, counts, weights, state, columns, documents,
            s_qb, s_qh, s_qm, s_qd, s_ob, s_oh, s_om, s_od,
            b_k, b_v, b_dk, b_dv, b_pos, b_place, m_seen, b_segment, 1 - uniform,
            i_b, i_h, first_key + i_n * BN, scale, window, positions, cap, Hq, G, M, T, C,
            D, BD, BM, BN, PER_HEAD, BIAS, CAUSAL, NEGATE, DK, DV, IP,
        )  # fmt: skip
    p_out = ((i_z.to(tl.int64) * tl.num_programs(1) + i_h) * n_keys + o_n) * D
    if DK:
        store_rows(dk + p_out, b_dk * dk_scale, m_n, D, BD)
    if DV:
        store_rows(dv + p_out, b_dv, m_n, D, BD)


@triton.jit
def _add_rows(
    q, do, scored, counts, weights, state, columns, documents,
    s_qb, s_qh, s_qm, s_qd, s_ob, s_oh, s_om, s_od,
    b_k, b_v, b_dk, b_dv, b_pos, b_place, m_seen, b_segment, repeat,
    i_b, i_h, first_pos, scale, window, positions, cap, Hq, G, M, T, C,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER_HEAD: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, NEGATE: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Add the contributions of all rows of one batch element, or nothing if ``repeat`` is 0.

    ``b_segment`` is [BN] or [1]; ``b_place`` are the positions from which the window counts.
    """
    first_row = tl.load(counts + i_b * COUNTS + FIRST_ROW)
    start = 0 * M
    if CAUSAL:
        start = tl.minimum(tl.maximum(first_pos - (T - M), 0), M) // BM * BM
    n_blocks = (M - start + BM - 1) // BM
    if window is not None:
        if positions is None:
            # Scored rows see a document's keys whatever the window.
            of_rest = (tl.min(b_segment, 0) == C) | (first_row >= M)
            last = tl.where(of_rest, first_pos + BN - 1 + window - (T - M), M)
            n_blocks = tl.cdiv(tl.maximum(tl.minimum(last, M) - start, 0), BM)
    b_at = b_segment.to(tl.int64)[:, None]
    m_document = b_segment[:, None] < C
    for i in range(0, G * n_blocks * repeat):
        o_h = i_h * G + i // n_blocks
        o_m = start + i % n_blocks * BM + tl.arange(0, BM)
        m_m = o_m < M
        b_q = load_rows(row_pointers(q, i_b, o_h, o_m, s_qb, s_qh, s_qm), m_m, s_qd, D, BD)
        b_do = load_rows(row_pointers(do, i_b, o_h, o_m, s_ob, s_oh, s_om), m_m, s_od, D, BD)
        if NEGATE:
            b_q = -b_q
        b_row = i_b.to(tl.int64) * Hq + o_h
        p_columns = columns + b_row * COLUMNS * M + o_m
        b_norm = tl.load(p_columns + NORM * M, mask=m_m, other=float("inf"))[None, :]
        b_factor = tl.load(p_columns + FACTOR * M, mask=m_m, other=0.0)[None, :]
        b_offset = tl.load(p_columns + OFFSET * M, mask=m_m, other=0.0)[None, :]
        m_scored = m_m & (o_m >= tl.where(tl.load(scored + o_h) != 0, first_row, M))
        m_in = m_document & m_scored[None, :]  # [BN or 1, BM]
        p_weights = weights + (b_row if PER_HEAD else i_b.to(tl.int64)) * C
        b_w = tl.load(p_weights + b_at + m_in.to(tl.int64) * 0, mask=m_in, other=0.0)
        if BIAS:
            b_norm = b_norm - b_w
        else:
            o_in = b_row * (C + 1) * M + b_at * M + o_m[None, :]
            b_norm = tl.where(m_in, tl.load(state + o_in, mask=m_in, other=0.0), b_norm)
            b_mu = tl.load(p_columns + MU * M, mask=m_m, other=0.0)[None, :]
            b_factor = tl.where(m_in, b_mu * b_w, b_factor)
            if DK:
                b_offset = tl.where(m_in, tl.load(documents + o_in, mask=m_in, other=0.0), b_offset)

        b_s = products(b_k, b_q, cap, IP)  # [BN, BM]
        b_p = tl.exp2(b_s * scale - b_norm)
        m_s = m_seen[:, None]
        if CAUSAL:
            m_s = m_s & (b_pos[:, None] <= (T - M + o_m)[None, :])
        if window is not None:
            b_far = far_positions(window, positions, i_b, T - M + o_m, m_m, T)
            m_s = m_s & ((b_place[:, None] > b_far[None, :]) | m_in)
        b_p = tl.where(m_s, b_p, 0.0)
        if DV:
            b_dv = tl.dot((b_p * b_factor).to(b_do.dtype), b_do, b_dv, input_precision=IP)
        if DK:
            b_g = tl.dot(b_v, tl.trans(b_do), input_precision=IP)
            b_ds = b_p * (b_g * b_factor + b_offset)
            b_da = through_cap(b_ds, b_s, cap)
            b_dk = tl.dot(b_da.to(b_q.dtype), b_q, b_dk, input_precision=IP)
    return b_dk, b_dv
