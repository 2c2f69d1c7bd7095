"""The backward over rows: the documents' part in the scores' gradient, and the query's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    CENTER,
    COLUMNS,
    COUNTS,
    FACTOR,
    MU,
    N_REST,
    NORM,
    OFFSET,
    block_and_split,
    fold_pass,
    fold_range,
    in_units,
    load_query,
    load_rows,
    locate_scored_rows,
    rest_range,
    row_pointers,
    segment_bases,
    store_rows,
    visible_range,
    weight_pointers,
    work_share,
)
from dream_kernels.triton.options import far_positions
from dream_kernels.triton.rows_walk import (
    long_document_gradients,
    long_documents_at_once,
    plain_gradients,
    rest_gradients,
    short_document_gradients,
)


@triton.jit(do_not_specialize=["window", "M", "T", "P", "C", "NT", "S", "B", "Hq"])
def rows_kernel(
    q, k, v, pk, pv, do, mask, positions, table, n_scored, tiles, shorts, rest, counts, weights,
    state, columns, documents, parts, dq,
    s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd,
    s_pkb, s_pkh, s_pkn, s_pvb, s_pvh, s_pvn, s_ob, s_oh, s_om, s_od,
    scale, dq_scale, window, cap, B, Hq, G, M, T, P, C, NT, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    DQ: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One block of rows over all its keys, or over one split of them; grid as forward_kernel.

    ``DOCUMENTS`` writes ``documents`` ``[B, Hq, C + 1, M]``: for bias the sum of the logits'
    gradients over each document, for reweight ``dO . o_d``. ``DQ`` writes ``dq``, ``[B, Hq, M, D]``
    or one of that per split. Splits of reweight need a launch for each, since the gradients of a
    document's logits depend on ``dO . o_d``, and the document may be in several of them.
    """
    i_x, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIT > 1:
        s_qb, s_qh, s_qm = in_units(s_qb, s_qh, s_qm, UNIT)
        s_kb, s_kh, s_kn = in_units(s_kb, s_kh, s_kn, UNIT)
        s_vb, s_vh, s_vn = in_units(s_vb, s_vh, s_vn, UNIT)
        s_pkb, s_pkh, s_pkn = in_units(s_pkb, s_pkh, s_pkn, UNIT)
        s_pvb, s_pvh, s_pvn = in_units(s_pvb, s_pvh, s_pvn, UNIT)
        s_ob, s_oh, s_om = in_units(s_ob, s_oh, s_om, UNIT)
    i_m, i_s = block_and_split(i_x, S, SPLIT)
    m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
        i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
    )  # fmt: skip
    b_pos = T - M + o_m
    b_q = load_query(q, o_b, o_h, o_m, m_r, s_qb, s_qh, s_qm, s_qd, D, BD, NEGATE)
    b_do = load_rows(row_pointers(do, o_b, o_h, o_m, s_ob, s_oh, s_om), m_r, s_od, D, BD)
    k_l, k_p = segment_bases(k, pk, i_h, P, s_kh, s_kn, s_pkh)
    v_l, v_p = segment_bases(v, pv, i_h, P, s_vh, s_vn, s_pvh)
    b_row = o_b.to(tl.int64) * Hq + o_h  # [BM]
    p_columns = columns + b_row * COLUMNS * M + o_m
    p_state = state + b_row * (C + 1) * M + o_m
    p_documents = documents + b_row * (C + 1) * M + o_m
    n_rows = B.to(tl.int64) * Hq * M
    p_part = parts + i_s.to(tl.int64) * 2 * n_rows + b_row * M + o_m
    p_weights = weight_pointers(weights, b_row, o_b, i_b, C, PER_HEAD, FOLD)
    b_first, n_own, n_common, unlike = fold_range(i_m, i_b, counts, m_r, o_b, B, M, G, BM, FOLD)
    # As in forward_kernel: rows are located again, so that pointers need no registers until then.
    i_later = i_m + tl.minimum(T, 0)
    b_norm, b_offset, b_mu, b_center = _document_columns(p_columns, m_scored, M, BM, BIAS or DQ)
    if tl.max(m_scored.to(tl.int32), 0) > 0:
        b_dq = tl.zeros([BM, BD], tl.float32)
        b_dq = _scored_documents(
            b_q, b_do, b_dq, b_norm, b_offset, b_mu, b_center, o_b, m_scored, i_b, b_first,
            n_common, unlike, i_s, S, k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn,
            s_vn, s_pvn, s_kd, s_vd, mask, tiles, shorts, counts, p_weights, p_state, p_documents,
            p_part, n_rows, scale, cap, B, M, T, P, C, NT, D, BD, BM, BN, SLOT, BIAS, FIXED,
            HAS_PREFIX, HAS_MASK, DOCUMENTS, DQ, FOLD, SPLIT, IP,
        )  # fmt: skip
        if DQ:
            m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
                i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
            )  # fmt: skip
            b_pos = T - M + o_m
            b_dq = _scored_rest(
                b_q, b_do, b_dq, b_pos, o_b, o_h, o_m, m_scored, i_b, b_first, n_own, unlike, i_s,
                S, k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd,
                s_vd, mask, positions, rest, counts, columns, scale, window, cap, B, Hq, M, T, D,
                BD, BM, BN, SLOT, CAUSAL, HAS_PREFIX, HAS_MASK, FOLD, SPLIT, IP,
            )  # fmt: skip
            _, o_b, o_h, o_m, m_scored = locate_scored_rows(
                i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
            )  # fmt: skip
            b_row = o_b.to(tl.int64) * Hq + o_h
            p_dq = dq + (i_s.to(tl.int64) * n_rows + b_row * M + o_m) * D
            store_rows(p_dq, b_dq * dq_scale, m_scored, D, BD)

    if DQ:
        m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
            i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        m_plain = m_r & (m_scored == 0)
        # From zeros again: accumulators that come out of a branch would make the products wait.
        if tl.max(m_plain.to(tl.int32), 0) > 0:
            b_dq = _plain_rows(
                b_q, b_do, o_b, o_h, o_m, m_plain, i_b, b_first, n_own, n_common, unlike, i_s, S,
                k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
                mask, positions, columns, scale, window, cap, B, Hq, M, T, P, D, BD, BM, BN, CAUSAL,
                HAS_PREFIX, HAS_MASK, FOLD, SPLIT, IP,
            )  # fmt: skip
            m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
                i_later + tl.minimum(T, 0), i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
            )  # fmt: skip
            b_row = o_b.to(tl.int64) * Hq + o_h
            p_dq = dq + (i_s.to(tl.int64) * n_rows + b_row * M + o_m) * D
            store_rows(p_dq, b_dq * dq_scale, m_r & (m_scored == 0), D, BD)


@triton.jit
def _document_columns(p_columns, m_rows, M, BM: tl.constexpr, NEEDED: tl.constexpr):
    """``[BM]`` norm, offset, mass and center of all documents, for the loops over documents.

    Masked rows have an infinite norm, which makes all their terms 0.
    """
    if NEEDED:
        b_norm = tl.load(p_columns + NORM * M, mask=m_rows, other=float("inf"))
        b_offset = tl.load(p_columns + OFFSET * M, mask=m_rows, other=0.0)
        b_mu = tl.load(p_columns + MU * M, mask=m_rows, other=0.0)
        b_center = tl.load(p_columns + CENTER * M, mask=m_rows, other=0.0)
    else:
        b_offset = tl.zeros([BM], tl.float32)
        b_norm = b_offset + float("inf")
        b_mu = b_offset
        b_center = b_offset
    return b_norm, b_offset, b_mu, b_center


@triton.jit
def _scored_documents(
    b_q, b_do, b_dq, b_norm, b_offset, b_mu, b_center, o_b, m_scored, i_b, b_first, n_common,
    unlike, i_s, S, k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd,
    s_vd, mask, tiles, shorts, counts, p_weights, p_state, p_documents, p_part, n_rows,
    scale, cap, B, M, T, P, C, NT, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, DOCUMENTS: tl.constexpr, DQ: tl.constexpr,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Visit the documents for the scored rows."""
    for z in range(0, n_common):
        i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_scored, B, FOLD)
        k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
        v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
        p_counts = counts + i_z * COUNTS
        p_mask = mask + i_z * T
        n_tiles, rest_begin, t_begin, t_end = work_share(p_counts, i_s, S, BN, SLOT, SPLIT)
        b_dq = short_document_gradients(
            b_q, b_do, b_dq, b_norm, b_offset, b_mu, b_center, m_z, i_z, n_tiles, rest_begin,
            t_begin, t_end, k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask,
            shorts, p_counts, p_weights, p_state, p_documents, scale, cap, M, C,
            D, BD, BM, BN, SLOT, BIAS, FIXED, HAS_PREFIX, HAS_MASK, DOCUMENTS, DQ, IP,
        )  # fmt: skip
        if DQ and DOCUMENTS and not BIAS:
            tl.static_assert(not (FOLD or SPLIT))
            b_dq = long_documents_at_once(
                b_q, b_do, b_dq, b_norm, b_offset, b_mu, b_center, m_z, i_z, n_tiles,
                k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, tiles,
                p_weights, p_state, p_documents, scale, cap, M, P, NT,
                D, BD, BM, BN, FIXED, HAS_PREFIX, HAS_MASK, IP,
            )  # fmt: skip
        else:
            b_dq = long_document_gradients(
                b_q, b_do, b_dq, b_norm, b_offset, b_mu, m_z, i_z, n_tiles, t_begin, t_end,
                k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, tiles,
                p_weights, p_state, p_documents, p_part, n_rows, scale, cap, M, P, NT,
                D, BD, BM, BN, BIAS, HAS_PREFIX, HAS_MASK, DOCUMENTS, DQ, SPLIT, IP,
            )  # fmt: skip
    return b_dq


@triton.jit
def _scored_rest(
    b_q, b_do, b_dq, b_pos, o_b, o_h, o_m, m_scored, i_b, b_first, n_own, unlike, i_s, S,
    k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
    mask, positions, rest, counts, columns, scale, window, cap, B, Hq, M, T, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Visit the rest for the scored rows."""
    p_columns = columns + (o_b.to(tl.int64) * Hq + o_h) * COLUMNS * M + o_m
    b_norm = tl.load(p_columns + NORM * M, mask=m_scored, other=float("inf"))
    b_offset = tl.load(p_columns + OFFSET * M, mask=m_scored, other=0.0)
    b_factor = tl.load(p_columns + FACTOR * M, mask=m_scored, other=0.0)
    b_far = None
    if window is not None:
        b_far = far_positions(window, positions, o_b, b_pos, m_scored, T)
    # Pass 0 visits the prefix in common, pass z > 0 the keys of the z-th element alone.
    for z in range(0 if FOLD else 1, n_own + 1):
        i_z, m_z = fold_pass(tl.maximum(z - 1, 0), z, i_b, b_first, o_b, m_scored, B, FOLD)
        k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
        v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
        p_counts = counts + i_z * COUNTS
        p_mask = mask + i_z * T
        n_rest = tl.load(p_counts + N_REST)
        if CAUSAL:
            n_rest = n_rest - (T - 1 - tl.max(tl.where(m_scored, b_pos, 0), 0))
        begin, end, _ = rest_range(
            p_counts, z, unlike, n_rest, b_far, positions, m_scored, T, i_s, S,
            BN, SLOT, FOLD, SPLIT,
        )  # fmt: skip
        b_n = b_norm
        if FOLD:
            b_n = tl.where(m_z, b_norm, float("inf"))
        b_dq = rest_gradients(
            b_q, b_do, b_dq, b_n, b_factor, b_offset, b_pos, b_far, i_z, begin, end,
            k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, positions, rest,
            p_counts, scale, cap, T, D, BD, BN, CAUSAL, HAS_PREFIX, HAS_MASK, IP,
        )  # fmt: skip
    return b_dq


@triton.jit
def _plain_rows(
    b_q, b_do, o_b, o_h, o_m, m_plain, i_b, b_first, n_own, n_common, unlike, i_s, S,
    k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
    mask, positions, columns, scale, window, cap, B, Hq, M, T, P, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """The query's gradient of the rows ``m_plain``."""
    b_pos = T - M + o_m
    b_far = None
    if window is not None:
        b_far = far_positions(window, positions, o_b, b_pos, m_plain, T)
    begin, end, n_clear = visible_range(
        m_plain, b_pos, b_far, positions, T, i_s, S, BN, CAUSAL, SPLIT
    )  # fmt: skip
    b_dq = tl.zeros([BM, BD], tl.float32)
    p_columns = columns + (o_b.to(tl.int64) * Hq + o_h) * COLUMNS * M + o_m
    b_norm = tl.load(p_columns + NORM * M, mask=m_plain, other=float("inf"))
    b_offset = tl.load(p_columns + OFFSET * M, mask=m_plain, other=0.0)
    if HAS_PREFIX:
        for z in range(0, n_common):
            i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_plain, B, FOLD)
            b_n = b_norm
            if FOLD:
                b_n = tl.where(m_z, b_norm, float("inf"))
            b_dq = plain_gradients(
                b_q, b_do, b_dq, b_n, b_offset, b_pos, b_far, i_z, k_p + i_z * s_pkb,
                v_p + i_z * s_pvb, mask + i_z * T, positions, s_pkn, s_kd, s_pvn, s_vd, begin,
                tl.minimum(end, P), n_clear, scale, cap, T, D, BD, BN, CAUSAL, HAS_MASK, IP,
            )  # fmt: skip
    for z in range(0, n_own):
        i_z, m_z = fold_pass(z, 1, i_b, b_first, o_b, m_plain, B, FOLD)
        b_n = b_norm
        if FOLD:
            b_n = tl.where(m_z, b_norm, float("inf"))
        b_dq = plain_gradients(
            b_q, b_do, b_dq, b_n, b_offset, b_pos, b_far, i_z, k_l + i_z * s_kb, v_l + i_z * s_vb,
            mask + i_z * T, positions, s_kn, s_kd, s_vn, s_vd, tl.maximum(begin, P), end, n_clear,
            scale, cap, T, D, BD, BN, CAUSAL, HAS_MASK, IP,
        )  # fmt: skip
    return b_dq
