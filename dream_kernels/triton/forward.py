"""The forward pass: online softmax document by document, with split keys if rows are few."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COUNTS,
    block_and_split,
    fold_pass,
    fold_range,
    in_units,
    load_query,
    locate_scored_rows,
    segment_bases,
    store_rows,
    visible_range,
    weight_pointers,
    work_share,
)
from dream_kernels.triton.forward_walk import (
    long_documents,
    plain_keys,
    rest_keys,
    short_documents,
    store_part,
)
from dream_kernels.triton.options import far_positions
from dream_kernels.triton.softmax import document_share, empty_softmax, inverse


@triton.jit(do_not_specialize=["window", "M", "T", "P", "C", "NT", "S", "B", "Hq"])
def forward_kernel(
    q, k, v, pk, pv, mask, positions, sinks, table, n_scored, tiles, shorts, rest, counts, weights,
    o, o_part, state, part_o, part_lse,
    s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd,
    s_pkb, s_pkh, s_pkn, s_pvb, s_pvh, s_pvn,
    scale, document_mass, window, cap, B, Hq, G, M, T, P, C, NT, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr, KEEP: tl.constexpr,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``o`` ``[B, Hq, M, D]`` and ``state`` for one block of rows, or one split of its keys.

    Grid ``(row blocks * S, Hkv, B)``, or with ``FOLD``, which needs a shared prefix,
    ``(row blocks of the whole batch * S, Hkv, 1)``. See README.md for the algorithm. ``state`` is
    ``[B, Hq, C + 1 or 1, M]``: the documents, and last the rest or the whole softmax. ``KEEP``
    writes the scored rows of ``o_part``, as ``o``, too: ``sum_d w_d o_d``, or with a fixed mass the
    output of the rest alone.
    """
    i_x, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIT > 1:
        s_qb, s_qh, s_qm = in_units(s_qb, s_qh, s_qm, UNIT)
        s_kb, s_kh, s_kn = in_units(s_kb, s_kh, s_kn, UNIT)
        s_vb, s_vh, s_vn = in_units(s_vb, s_vh, s_vn, UNIT)
        s_pkb, s_pkh, s_pkn = in_units(s_pkb, s_pkh, s_pkn, UNIT)
        s_pvb, s_pvh, s_pvn = in_units(s_pvb, s_pvh, s_pvn, UNIT)
    i_m, i_s = block_and_split(i_x, S, SPLIT)
    m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
        i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
    )  # fmt: skip
    b_pos = T - M + o_m  # [BM] position of each row
    b_q = load_query(q, o_b, o_h, o_m, m_r, s_qb, s_qh, s_qm, s_qd, D, BD, NEGATE)
    k_l, k_p = segment_bases(k, pk, i_h, P, s_kh, s_kn, s_pkh)
    v_l, v_p = segment_bases(v, pv, i_h, P, s_vh, s_vn, s_pvh)
    n_slots = C * 0 + 1 if BIAS else C + 1
    b_row = o_b.to(tl.int64) * Hq + o_h  # [BM]
    p_state = state + b_row * n_slots * M + o_m
    n_rows = B.to(tl.int64) * Hq * M
    p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
    # To locate the rows again after the loops: the minimum is 0, but the compiler does not know it,
    # and so keeps no pointers in registers through the loops, from which they would spill.
    i_later = i_m + tl.minimum(T, 0)
    b_first, n_own, n_common, unlike = fold_range(i_m, i_b, counts, m_r, o_b, B, M, G, BM, FOLD)

    if tl.max(m_scored.to(tl.int32), 0) > 0:
        b_acc, b_all_m, b_all_l, b_m, b_l, b_part, b_has_rest = _scored_rows(
            b_q, b_pos, b_row, o_b, o_h, m_scored, i_b, b_first, n_own, n_common, unlike, i_s, S,
            k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            mask, positions, sinks, tiles, shorts, rest, counts, weights, p_state, part_o,
            part_lse, p_part, n_rows, scale, window, cap, B, M, T, P, C, NT, D, BD, BM, BN, SLOT,
            PER_HEAD, BIAS, CAUSAL, HAS_PREFIX, HAS_MASK, FOLD, SPLIT, IP,
        )  # fmt: skip
        m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
            i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        b_row = o_b.to(tl.int64) * Hq + o_h
        _store_scored(
            o, o_part, state, part_o, part_lse, b_row, o_m, m_scored, b_acc, b_all_m, b_all_l,
            b_m, b_l, b_part, b_has_rest, i_s, n_rows, n_slots, document_mass, M, D, BD,
            BIAS, FIXED, KEEP, SPLIT,
        )  # fmt: skip

    m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
        i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
    )  # fmt: skip
    m_plain = m_r & (m_scored == 0)
    if tl.max(m_plain.to(tl.int32), 0) > 0:
        b_m, b_l, b_part = _plain_rows(
            b_q, T - M + o_m, o_b, o_h, m_plain, i_b, b_first, n_own, n_common, unlike, i_s, S,
            k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            mask, positions, sinks, scale, window, cap, B, T, P,
            D, BD, BM, BN, CAUSAL, HAS_PREFIX, HAS_MASK, FOLD, SPLIT, IP,
        )  # fmt: skip
        m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
            i_later + tl.minimum(T, 0), i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        m_plain = m_r & (m_scored == 0)
        b_row = o_b.to(tl.int64) * Hq + o_h
        _store_plain(
            o, state, part_o, part_lse, b_row, o_m, m_plain, b_m, b_l, b_part, i_s, n_rows,
            n_slots, M, D, BD, SPLIT,
        )  # fmt: skip


@triton.jit
def _scored_rows(
    b_q, b_pos, b_row, o_b, o_h, m_scored, i_b, b_first, n_own, n_common, unlike, i_s, S,
    k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
    mask, positions, sinks, tiles, shorts, rest, counts, weights, p_state, part_o, part_lse,
    p_part, n_rows, scale, window, cap, B, M, T, P, C, NT, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr, PER_HEAD: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Visit the documents, then the rest, for the scored rows.

    Returns:
        b_acc, b_all_m, b_all_l: reweight, finished documents: the sum of their weighted outputs,
            peak and relative sum of all their logits.
        b_m, b_l, b_part: the online softmax of the rest; for bias of all keys.
        b_has_rest: ``[BM]`` above 0 for rows whose split reaches into the rest.
    """
    top_pos = tl.max(tl.where(m_scored, b_pos, 0), 0)
    low_pos = tl.min(tl.where(m_scored, b_pos, T), 0)
    b_acc = tl.zeros([BM, BD], tl.float32)
    # Splits leave the sink to combine_kernel, which joins them.
    own_sinks = None if SPLIT else sinks
    b_all_m, b_all_l = empty_softmax(own_sinks if BIAS else None, o_h, BM)
    b_far = None
    if window is not None:
        b_far = far_positions(window, positions, o_b, b_pos, m_scored, T)
    p_weights = weight_pointers(weights, b_row, o_b, i_b, C, PER_HEAD, FOLD)
    for z in range(0, n_common):
        i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_scored, B, FOLD)
        k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
        v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
        p_counts = counts + i_z * COUNTS
        p_mask = mask + i_z * T
        n_tiles, rest_begin, t_begin, t_end = work_share(p_counts, i_s, S, BN, SLOT, SPLIT)
        b_acc, b_all_m, b_all_l = short_documents(
            b_q, b_acc, b_all_m, b_all_l, m_z, i_z, n_tiles, rest_begin, t_begin, t_end,
            k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, shorts,
            p_counts, p_weights, p_state, scale, cap, M, C,
            D, BD, BM, BN, SLOT, BIAS, HAS_PREFIX, HAS_MASK, FOLD, IP,
        )  # fmt: skip
        b_acc, b_all_m, b_all_l = long_documents(
            b_q, b_acc, b_all_m, b_all_l, m_z, unlike, i_z, n_tiles, t_begin, t_end,
            k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, tiles,
            p_weights, p_state, part_o, part_lse, p_part, n_rows, scale, cap, M, P, NT,
            D, BD, BM, BN, BIAS, HAS_PREFIX, HAS_MASK, FOLD, SPLIT, IP,
        )  # fmt: skip

    if BIAS:
        b_m, b_l, b_part = b_all_m, b_all_l, b_acc
    else:
        b_m, b_l = empty_softmax(own_sinks, o_h, BM)
        b_part = tl.zeros([BM, BD], tl.float32)
    b_has_rest = o_b * 0
    # Pass 0 visits the prefix in common, pass z > 0 the keys of the z-th element alone.
    for z in range(0 if FOLD else 1, n_own + 1):
        i_z, m_z = fold_pass(tl.maximum(z - 1, 0), z, i_b, b_first, o_b, m_scored, B, FOLD)
        k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
        v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
        p_counts = counts + i_z * COUNTS
        p_mask = mask + i_z * T
        b_m, b_l, b_part, b_has_rest = rest_keys(
            b_q, b_m, b_l, b_part, b_has_rest, b_pos, b_far, m_scored, m_z, z, unlike, i_z, i_s, S,
            top_pos, low_pos, k_lz, k_pz, v_lz, v_pz, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            p_mask, positions, rest, p_counts, scale, cap, T, D, BD, BM, BN, SLOT, CAUSAL,
            HAS_PREFIX, HAS_MASK, FOLD, SPLIT, IP,
        )  # fmt: skip
    return b_acc, b_all_m, b_all_l, b_m, b_l, b_part, b_has_rest


@triton.jit
def _plain_rows(
    b_q, b_pos, o_b, o_h, m_plain, i_b, b_first, n_own, n_common, unlike, i_s, S,
    k_l, k_p, v_l, v_p, s_kb, s_pkb, s_vb, s_pvb, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
    mask, positions, sinks, scale, window, cap, B, T, P, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MASK: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Plain attention of the rows ``m_plain`` to the prefix, then to the local keys."""
    b_far = None
    if window is not None:
        b_far = far_positions(window, positions, o_b, b_pos, m_plain, T)
    begin, end, n_clear = visible_range(
        m_plain, b_pos, b_far, positions, T, i_s, S, BN, CAUSAL, SPLIT
    )  # fmt: skip
    b_m, b_l = empty_softmax(None if SPLIT else sinks, o_h, BM)
    b_acc = tl.zeros([BM, BD], tl.float32)
    if HAS_PREFIX:
        for z in range(0, n_common):
            i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_plain, B, FOLD)
            b_m, b_l, b_acc = plain_keys(
                b_q, b_m, b_l, b_acc, m_z, b_pos, b_far, i_z, k_p + i_z * s_pkb, v_p + i_z * s_pvb,
                mask + i_z * T, positions, s_pkn, s_kd, s_pvn, s_vd, begin, tl.minimum(end, P),
                n_clear, scale, cap, T, D, BD, BN, CAUSAL, HAS_MASK, FOLD, IP,
            )  # fmt: skip
    for z in range(0, n_own):
        i_z, m_z = fold_pass(z, 1, i_b, b_first, o_b, m_plain, B, FOLD)
        b_m, b_l, b_acc = plain_keys(
            b_q, b_m, b_l, b_acc, m_z, b_pos, b_far, i_z, k_l + i_z * s_kb, v_l + i_z * s_vb,
            mask + i_z * T, positions, s_kn, s_kd, s_vn, s_vd, tl.maximum(begin, P), end,
            n_clear, scale, cap, T, D, BD, BN, CAUSAL, HAS_MASK, FOLD, IP,
        )  # fmt: skip
    return b_m, b_l, b_acc


@triton.jit
def _store_plain(
    o, state, part_o, part_lse, b_row, o_m, m_rows, b_m, b_l, b_acc, i_s, n_rows, n_slots, M,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of plain rows."""
    if SPLIT:
        p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
        store_part(part_o, part_lse, p_part + 2 * n_rows, b_m, b_l, b_acc, m_rows, D, BD)
    else:
        p_last = state + (b_row * n_slots + n_slots - 1) * M + o_m
        tl.store(p_last, b_m + tl.log2(b_l), mask=m_rows)
        b_o = b_acc * inverse(b_l)[:, None]
        store_rows(o + (b_row * M + o_m) * D, b_o, m_rows, D, BD)


@triton.jit
def _store_scored(
    o, o_part, state, part_o, part_lse, b_row, o_m, m_rows, b_acc, b_all_m, b_all_l, b_m, b_l,
    b_part, b_has_rest, i_s, n_rows, n_slots, document_mass, M,
    D: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of scored rows, of all keys for bias and of the rest otherwise.

    The other arguments are what ``_scored_rows`` returns.
    """
    if SPLIT:
        p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
        m_rest = m_rows
        if not BIAS:
            m_rest = m_rows & (b_has_rest > 0)
            tl.store(part_lse + p_part, b_all_m + tl.log2(b_all_l), mask=m_rows)
            store_rows(part_o + p_part * D, b_acc, m_rows, D, BD)
        store_part(part_o, part_lse, p_part + 2 * n_rows, b_m, b_l, b_part, m_rest, D, BD)
    else:
        b_lse = b_m + tl.log2(b_l)
        p_last = state + (b_row * n_slots + n_slots - 1) * M + o_m
        tl.store(p_last, b_lse, mask=m_rows)
        if BIAS:
            b_o = b_part * inverse(b_l)[:, None]
        else:
            b_part = b_part * inverse(b_l)[:, None]
            if KEEP:
                p_kept = o_part + (b_row * M + o_m) * D
                store_rows(p_kept, b_part if FIXED else b_acc, m_rows, D, BD)
            b_mu, b_rest = document_share(b_all_m + tl.log2(b_all_l), b_lse, document_mass, FIXED)
            b_o = b_acc * b_mu[:, None] + b_part * b_rest[:, None]
        store_rows(o + (b_row * M + o_m) * D, b_o, m_rows, D, BD)
