"""The backward over rows: what each document gives to the scores, and the query's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COLUMNS,
    COUNTS,
    FACTOR,
    FIRST,
    LAST,
    MU,
    N_REST,
    NORM,
    OFFSET,
    fold_pass,
    fold_range,
    load_pack,
    load_pair,
    load_rest,
    load_rows,
    load_run,
    load_tile,
    locate_scored_rows,
    rest_range,
    row_pointers,
    segment_bases,
    store_rows,
    visible_range,
    weight_pointers,
    work,
)


@triton.jit
def logit_gradient(
    b_q, b_do, b_k, b_v, b_norm, b_factor, b_offset, scale, IP: tl.constexpr
):  # fmt: skip
    """``[BM, BN]``: ``exp(a - norm) (factor g + offset)``, of which every case is an instance."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
    b_g = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
    b_p = tl.exp2(b_s * scale - b_norm[:, None])
    return b_p * (b_g * b_factor[:, None] + b_offset[:, None])


@triton.jit(do_not_specialize=["M", "T", "P", "C", "NT", "S", "B", "Hq"])
def rows_kernel(
    q, k, v, pk, pv, do, mask, table, n_scored, tiles, shorts, rest, counts, weights,
    state, columns, documents, parts, dq,
    s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd,
    s_pkb, s_pkh, s_pkn, s_pvb, s_pvh, s_pvn, s_ob, s_oh, s_om, s_od,
    scale, dq_scale, B, Hq, G, M, T, P, C, NT, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, DQ: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """One block of rows over all its keys, or over one split of them.

    ``DOCUMENTS`` writes to ``documents`` ``[B, Hq, C + 1, M]``: for bias the sum of the logits'
    gradients over each document, for reweight ``dO . o_d``, of the rest too when the mass is
    fixed. ``DQ`` writes ``dq``, ``[B, Hq, M, D]`` or one of that per split. Reweight needs two
    launches, since the logits' gradients hang on all of ``dO . o_d``. Grid as forward_kernel.
    """
    i_x, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m, i_s = i_x, i_x * 0
    if SPLIT:
        i_m, i_s = i_x // S, i_x % S
    m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
        i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
    )  # fmt: skip
    b_pos = T - M + o_m

    b_q = load_rows(row_pointers(q, o_b, o_h, o_m, s_qb, s_qh, s_qm), m_r, s_qd, D, BD)
    b_do = load_rows(row_pointers(do, o_b, o_h, o_m, s_ob, s_oh, s_om), m_r, s_od, D, BD)
    if NEGATE:
        b_q = -b_q
    k_l, k_p = segment_bases(k, pk, i_h, P, s_kh, s_kn, s_pkh)
    v_l, v_p = segment_bases(v, pv, i_h, P, s_vh, s_vn, s_pvh)
    b_row = o_b.to(tl.int64) * Hq + o_h  # [BM]
    p_columns = columns + b_row * COLUMNS * M + o_m
    p_state = state + b_row * (C + 1) * M + o_m
    p_documents = documents + b_row * (C + 1) * M + o_m
    n_rows = B.to(tl.int64) * Hq * M
    p_part = parts + i_s.to(tl.int64) * 2 * n_rows + b_row * M + o_m
    p_weights = weight_pointers(weights, b_row, o_b, i_b, C, PER_HEAD, FOLD)
    b_first = i_b
    n_own = 1
    n_common = 1
    unlike = 0
    if FOLD:
        b_first, n_own, unlike = fold_range(i_m, counts, m_r, o_b, B, M, G, BM)
        n_common = 1 + (n_own - 1) * unlike
    # As in forward_kernel: located anew later, the rows' pointers need no registers until then.
    i_later = i_m + tl.minimum(T, 0)
    b_zero = tl.zeros([BM], tl.float32)
    b_one = b_zero + 1.0
    b_inf = b_zero + float("inf")
    # Rows that a pass does not concern get an infinite norm, which makes all their terms 0.
    b_norm = b_inf
    b_offset = b_zero
    b_mu = b_zero
    if BIAS or DQ:
        b_norm = tl.load(p_columns + NORM * M, mask=m_scored, other=float("inf"))
        b_offset = tl.load(p_columns + OFFSET * M, mask=m_scored, other=0.0)
        b_mu = tl.load(p_columns + MU * M, mask=m_scored, other=0.0)
    b_dq = tl.zeros([BM, BD], tl.float32)

    if tl.max(m_scored.to(tl.int32), 0) > 0:
        for z in range(0, n_common):
            i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_scored, B, FOLD)
            k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
            v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
            p_counts = counts + i_z * COUNTS
            p_mask = mask + i_z * T
            n_tiles, n_behind, t_begin, t_end = work(p_counts, i_s, S, BN, SLOT, SPLIT)
            b_sum = b_zero
            begun = t_begin < 0  # whether the document at hand began in this split
            open_document = t_begin < 0
            for t in range(t_begin, tl.minimum(t_end, n_tiles)):
                key0, n, doc, flags = load_tile(tiles, i_z, NT, t)
                o_n = tl.arange(0, BN)
                m_n = o_n < n
                b_k, b_v = load_pair(
                    k_lz, k_pz, v_lz, v_pz, key0 + o_n, m_n, key0 < P, s_kn, s_pkn, s_vn, s_pvn,
                    s_kd, s_vd, D, BD, HAS_PREFIX,
                )  # fmt: skip
                slot = doc.to(tl.int64) * M
                if BIAS:
                    b_w = tl.load(p_weights + doc)
                    b_n, b_f, b_u = tl.where(m_z, b_norm - b_w, b_inf), b_one, b_offset
                else:
                    b_n = tl.load(p_state + slot, mask=m_z, other=float("inf"))
                    b_f, b_u = b_one, b_zero
                    if DQ:
                        b_f = b_mu * tl.load(p_weights + doc)
                        b_u = tl.load(p_documents + slot, mask=m_z, other=0.0)
                b_ds = logit_gradient(b_q, b_do, b_k, b_v, b_n, b_f, b_u, scale, IP)
                if HAS_MASK:
                    m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
                    b_ds = tl.where(m_n[None, :], b_ds, 0.0)
                elif n < BN:
                    b_ds = tl.where(m_n[None, :], b_ds, 0.0)
                if DQ:
                    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=IP)
                if DOCUMENTS:
                    first = (flags & FIRST) != 0
                    begun = begun | first
                    b_sum = tl.where(first, 0.0, b_sum) + tl.sum(b_ds, 1)
                    closes = (flags & LAST) != 0
                    open_document = (flags & LAST) == 0
                    if SPLIT:
                        if closes & (begun == 0):
                            tl.store(p_part, b_sum, mask=m_z)
                        closes = closes & begun
                    if closes:
                        tl.store(p_documents + slot, b_sum, mask=m_z)
            if DOCUMENTS:
                if SPLIT:
                    if open_document:
                        tl.store(p_part + n_rows, b_sum, mask=m_z)

            NS: tl.constexpr = BN // SLOT
            for t in range(tl.maximum(t_begin, n_tiles), tl.minimum(t_end, n_behind)):
                b_doc, m_doc, b_at, m_n, inside = load_pack(
                    shorts, p_counts, i_z, t - n_tiles, C, BN, SLOT
                )
                b_k, b_v = load_pair(
                    k_lz, k_pz, v_lz, v_pz, b_at, m_n, inside, s_kn, s_pkn, s_vn, s_pvn,
                    s_kd, s_vd, D, BD, HAS_PREFIX,
                )  # fmt: skip
                if HAS_MASK:
                    m_n = tl.load(p_mask + b_at, mask=m_n, other=0) != 0
                m_rs = m_z[:, None] & m_doc[None, :]  # [BM, NS]
                b_slot = b_doc.to(tl.int64)[None, :] * M
                b_w = tl.load(p_weights[:, None] + b_doc[None, :], mask=m_doc[None, :], other=0.0)
                if BIAS:
                    b_n = tl.where(m_rs, b_norm[:, None] - b_w, float("inf"))
                else:
                    b_n = tl.load(p_state[:, None] + b_slot, mask=m_rs, other=float("inf"))
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
                b_g = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
                b_s = tl.where(m_n[None, :], b_s, float("-inf"))
                b_ds = tl.exp2(tl.reshape(b_s, [BM, NS, SLOT]) * scale - b_n[:, :, None])
                b_g = tl.reshape(b_g, [BM, NS, SLOT])
                if BIAS:
                    b_ds = b_ds * (b_g + b_offset[:, None, None])
                elif DQ:
                    b_u = tl.load(p_documents[:, None] + b_slot, mask=m_rs, other=0.0)
                    b_ds = b_ds * (b_g * (b_w * b_mu[:, None])[:, :, None] + b_u[:, :, None])
                else:
                    b_ds = b_ds * b_g
                if DOCUMENTS:
                    tl.store(p_documents[:, None] + b_slot, tl.sum(b_ds, 2), mask=m_rs)
                if DQ:
                    b_ds = tl.reshape(b_ds, [BM, BN]).to(b_k.dtype)
                    b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=IP)

        if DQ or (DOCUMENTS and FIXED):
            m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
                i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
            )  # fmt: skip
            b_pos = T - M + o_m
            b_row = o_b.to(tl.int64) * Hq + o_h
            b_factor = b_one
            if DQ:
                p_columns = columns + b_row * COLUMNS * M + o_m
                b_norm = tl.load(p_columns + NORM * M, mask=m_scored, other=float("inf"))
                b_offset = tl.load(p_columns + OFFSET * M, mask=m_scored, other=0.0)
                b_factor = tl.load(p_columns + FACTOR * M, mask=m_scored, other=0.0)
            else:
                p_rest = state + (b_row * (C + 1) + C) * M + o_m
                b_norm = tl.load(p_rest, mask=m_scored, other=float("inf"))
                b_norm = tl.where(b_norm == float("-inf"), float("inf"), b_norm)
            b_sum = b_zero
            # Pass 0 is the prefix in common, pass z > 0 what is element z's own.
            for z in range(0 if FOLD else 1, n_own + 1):
                i_z, m_z = fold_pass(
                    tl.maximum(z - 1, 0), z, i_b, b_first, o_b, m_scored, B, FOLD
                )  # fmt: skip
                k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
                v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
                p_counts = counts + i_z * COUNTS
                p_mask = mask + i_z * T
                n_rest = tl.load(p_counts + N_REST)
                if CAUSAL:
                    n_rest = n_rest - (T - 1 - tl.max(tl.where(m_scored, b_pos, 0), 0))
                begin, end, reach = rest_range(
                    p_counts, z, unlike, n_rest, i_s, S, BN, SLOT, FOLD, SPLIT
                )  # fmt: skip
                b_n = b_norm
                if FOLD:
                    b_n = tl.where(m_z, b_norm, float("inf"))
                for t in range(begin, end):
                    b_at, m_n, inside, _ = load_rest(rest, p_counts, i_z, t, T, BN)
                    b_k, b_v = load_pair(
                        k_lz, k_pz, v_lz, v_pz, b_at, m_n, inside, s_kn, s_pkn, s_vn, s_pvn,
                        s_kd, s_vd, D, BD, HAS_PREFIX,
                    )  # fmt: skip
                    if HAS_MASK:
                        m_n = tl.load(p_mask + b_at, mask=m_n, other=0) != 0
                    m_s = m_n[None, :]
                    if CAUSAL:
                        m_s = m_s & (b_at[None, :] <= b_pos[:, None])
                    b_ds = logit_gradient(
                        b_q, b_do, b_k, b_v, b_n, b_factor, b_offset, scale, IP
                    )  # fmt: skip
                    b_ds = tl.where(m_s, b_ds, 0.0)
                    if DQ:
                        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=IP)
                    else:
                        b_sum += tl.sum(b_ds, 1)
                if DOCUMENTS and FIXED:
                    # Every pass adds to the sums of its own rows, so the last to write is right.
                    if SPLIT:
                        if reach > 0:
                            p_rest = parts + (i_s.to(tl.int64) * 2 + 1) * n_rows + b_row * M + o_m
                            tl.store(p_rest, b_sum, mask=m_z)
                    else:
                        p_rest = documents + (b_row * (C + 1) + C) * M + o_m
                        tl.store(p_rest, b_sum, mask=m_z)

    if DQ:
        m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
            i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        m_plain = m_r & (m_scored == 0)
        if tl.max(m_plain.to(tl.int32), 0) > 0:
            begin, end, n_clear = visible_range(m_plain, b_pos, T, i_s, S, BN, CAUSAL, SPLIT)
            b_pos = T - M + o_m
            p_columns = columns + (o_b.to(tl.int64) * Hq + o_h) * COLUMNS * M + o_m
            b_norm = tl.load(p_columns + NORM * M, mask=m_plain, other=float("inf"))
            b_offset = tl.load(p_columns + OFFSET * M, mask=m_plain, other=0.0)
            if HAS_PREFIX:
                for z in range(0, n_common):
                    i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_plain, B, FOLD)
                    b_n = b_norm
                    if FOLD:
                        b_n = tl.where(m_z, b_norm, b_inf)
                    b_dq = _plain_gradient(
                        b_q, b_do, b_dq, b_n, b_offset, b_pos, k_p + i_z * s_pkb,
                        v_p + i_z * s_pvb, mask + i_z * T, s_pkn, s_kd, s_pvn, s_vd, begin,
                        tl.minimum(end, P), n_clear, scale, D, BD, BN, CAUSAL, HAS_MASK, IP,
                    )  # fmt: skip
            for z in range(0, n_own):
                i_z, m_z = fold_pass(z, 1, i_b, b_first, o_b, m_plain, B, FOLD)
                b_n = b_norm
                if FOLD:
                    b_n = tl.where(m_z, b_norm, b_inf)
                b_dq = _plain_gradient(
                    b_q, b_do, b_dq, b_n, b_offset, b_pos, k_l + i_z * s_kb, v_l + i_z * s_vb,
                    mask + i_z * T, s_kn, s_kd, s_vn, s_vd, tl.maximum(begin, P), end, n_clear,
                    scale, D, BD, BN, CAUSAL, HAS_MASK, IP,
                )  # fmt: skip
        m_r, o_b, o_h, o_m, _ = locate_scored_rows(
            i_later + tl.minimum(T, 0), i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        b_row = o_b.to(tl.int64) * Hq + o_h
        p_dq = dq + (i_s.to(tl.int64) * n_rows + b_row * M + o_m) * D
        store_rows(p_dq, b_dq * dq_scale, m_r, D, BD)


@triton.jit
def _plain_gradient(
    b_q, b_do, b_dq, b_norm, b_offset, b_pos, k, v, p_mask, s_kn, s_kd, s_vn, s_vd,
    begin, end, n_clear, scale, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The query's gradient from the keys ``begin .. end`` that plain rows see in one segment."""
    b_one = b_offset * 0.0 + 1.0
    clear = begin + tl.maximum(tl.minimum(end, n_clear) - begin, 0) // BN * BN
    for key0 in range(begin, clear, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        b_ds = logit_gradient(b_q, b_do, b_k, b_v, b_norm, b_one, b_offset, scale, IP)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
            b_ds = tl.where(m_n[None, :], b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    for key0 in range(clear, end, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= b_pos[:, None])
        b_ds = logit_gradient(b_q, b_do, b_k, b_v, b_norm, b_one, b_offset, scale, IP)
        b_dq = tl.dot(tl.where(m_s, b_ds, 0.0).to(b_k.dtype), b_k, b_dq, input_precision=IP)
    return b_dq
