"""The backward over rows: what each document passes back to the scores, and the query's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COLUMNS,
    COUNTS,
    FACTOR,
    FIRST,
    FIRST_ROW,
    LAST,
    MU,
    N_REST,
    N_SHORT,
    N_TILES,
    NORM,
    OFFSET,
    gather_pointers,
    load_rows,
    locate_rows,
    row_pointers,
    split_range,
    store_rows,
    tile_pointers,
)
from dream_kernels.triton.plan import load_span


@triton.jit
def logit_gradient(
    b_q, b_do, b_k, b_v, m_s, b_norm, b_factor, b_offset, scale, MASKED: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """``[BM, BN]``: ``exp(a - norm) (factor g + offset)``, of which every case is an instance."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
    b_g = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
    b_p = tl.exp2(b_s * scale - b_norm[:, None])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    return b_p * (b_g * b_factor[:, None] + b_offset[:, None])


@triton.jit(do_not_specialize=["M", "T", "P", "C", "NT", "S", "B", "Hq"])
def rows_kernel(
    q, k, v, pk, pv, do, spans, mask, table, n_scored, tiles, shorts, rest, counts, weights,
    state, columns, documents, parts, dq,
    s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd,
    s_pkb, s_pkh, s_pkn, s_pvb, s_pvh, s_pvn, s_ob, s_oh, s_om, s_od,
    scale, dq_scale, B, Hq, G, M, T, P, C, NT, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, DQ: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One block of rows over all its keys, or over one split of them.

    ``DOCUMENTS`` writes to ``documents`` ``[B, Hq, C + 1, M]``: for bias the sum of the logits'
    gradients over each document, for reweight ``dO . o_d``, of the rest too when the mass is
    fixed. ``DQ`` writes ``dq``, ``[B, Hq, M, D]`` or one of that per split. Reweight needs two
    launches, since the logits' gradients hang on all of ``dO . o_d``. Grid as forward_kernel.
    """
    i_x, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SPLIT:
        i_m, i_s = i_x // S, i_x % S
    else:
        i_m, i_s = i_x, i_x * 0
    m_r, o_g, o_h, o_m = locate_rows(i_m, i_h, table, M, G, BM)
    p_counts = counts + i_b * COUNTS
    m_scored = m_r & (o_g < tl.load(n_scored + i_h)) & (o_m >= tl.load(p_counts + FIRST_ROW))
    b_pos = T - M + o_m

    b_q = load_rows(row_pointers(q, i_b, o_h, o_m, s_qb, s_qh, s_qm), m_r, s_qd, D, BD)
    b_do = load_rows(row_pointers(do, i_b, o_h, o_m, s_ob, s_oh, s_om), m_r, s_od, D, BD)
    if NEGATE:
        b_q = -b_q
    i_kh = i_h.to(tl.int64)
    k_l = k + (i_b.to(tl.int64) * s_kb + i_kh * s_kh - P.to(tl.int64) * s_kn)
    v_l = v + (i_b.to(tl.int64) * s_vb + i_kh * s_vh - P.to(tl.int64) * s_vn)
    k_p = pk + (i_b.to(tl.int64) * s_pkb + i_kh * s_pkh)
    v_p = pv + (i_b.to(tl.int64) * s_pvb + i_kh * s_pvh)
    p_mask = mask + i_b.to(tl.int64) * T
    b_row = i_b.to(tl.int64) * Hq + o_h  # [BM]
    p_columns = columns + b_row * COLUMNS * M + o_m
    p_state = state + b_row * (C + 1) * M + o_m
    p_documents = documents + b_row * (C + 1) * M + o_m
    n_rows = B.to(tl.int64) * Hq * M
    p_part = parts + i_s.to(tl.int64) * 2 * n_rows + b_row * M + o_m
    if PER_HEAD:
        p_weights = weights + b_row * C
    else:
        p_weights = weights + i_b.to(tl.int64) * C + o_h * 0
    b_zero = tl.zeros([BM], tl.float32)
    b_one = b_zero + 1.0
    # Rows that a loop does not concern get an infinite norm, which makes all their terms 0.
    b_norm = b_zero + float("inf")
    b_offset = b_zero
    b_mu = b_zero
    if BIAS or DQ:
        b_norm = tl.load(p_columns + NORM * M, mask=m_scored, other=float("inf"))
        b_offset = tl.load(p_columns + OFFSET * M, mask=m_scored, other=0.0)
        b_mu = tl.load(p_columns + MU * M, mask=m_scored, other=0.0)
    b_dq = tl.zeros([BM, BD], tl.float32)

    if tl.max(m_scored.to(tl.int32), 0) > 0:
        n_tiles = tl.load(p_counts + N_TILES)
        n_short = tl.load(p_counts + N_SHORT)
        n_rest = tl.load(p_counts + N_REST)
        NS: tl.constexpr = BN // SLOT
        n_packs = (n_short + NS - 1) // NS
        n_work = n_tiles + n_packs + (n_rest + BN - 1) // BN
        t_begin = n_tiles * 0
        t_end = n_work
        if SPLIT:
            t_begin, t_end = split_range(n_work, i_s, S)

        b_sum = b_zero
        begun = t_begin < 0  # whether the document at hand began in this split
        open_document = t_begin < 0
        for t in range(t_begin, tl.minimum(t_end, n_tiles)):
            p_tile = tiles + (i_b.to(tl.int64) * NT + t) * 4
            key0, n, doc, flags = (
                tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3),
            )  # fmt: skip
            o_n = tl.arange(0, BN)
            m_n = o_n < n
            b_k = load_rows(
                tile_pointers(k_l, k_p, s_kn, s_pkn, key0, P, BN, HAS_PREFIX), m_n, s_kd, D, BD
            )
            b_v = load_rows(
                tile_pointers(v_l, v_p, s_vn, s_pvn, key0, P, BN, HAS_PREFIX), m_n, s_vd, D, BD
            )
            b_w = tl.load(p_weights + doc)
            slot = doc.to(tl.int64) * M
            if BIAS:
                b_n, b_f, b_u = b_norm - b_w, b_one, b_offset
            else:
                b_n = tl.load(p_state + slot, mask=m_scored, other=float("inf"))
                b_f, b_u = b_one, b_zero
                if DQ:
                    b_f = b_mu * b_w
                    b_u = tl.load(p_documents + slot, mask=m_scored, other=0.0)
            if HAS_MASK:
                m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
                b_ds = logit_gradient(
                    b_q, b_do, b_k, b_v, m_n[None, :], b_n, b_f, b_u, scale, True, IP
                )
            else:
                # Beyond the document v is 0 and so is g: only a tile's offset needs the mask.
                b_ds = logit_gradient(
                    b_q, b_do, b_k, b_v, m_n[None, :], b_n, b_f, b_u, scale, False, IP
                )
                if n < BN:
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
                        tl.store(p_part, b_sum, mask=m_scored)
                    closes = closes & begun
                if closes:
                    tl.store(p_documents + slot, b_sum, mask=m_scored)
        if DOCUMENTS:
            if SPLIT:
                if open_document:
                    tl.store(p_part + n_rows, b_sum, mask=m_scored)

        p_spans = spans + i_b.to(tl.int64) * C * 2
        first_pack = tl.maximum(t_begin - n_tiles, 0)
        last_pack = tl.minimum(t_end - n_tiles, n_packs)
        for t in range(first_pack, last_pack):
            o_s = t * NS + tl.arange(0, NS)
            m_s = o_s < n_short
            b_doc = tl.load(shorts + i_b.to(tl.int64) * C + o_s, mask=m_s, other=0)  # [NS]
            b_start, b_end = load_span(p_spans, b_doc, m_s, T)
            b_at = b_start[:, None] + tl.arange(0, SLOT)[None, :]  # [NS, SLOT]
            m_n = tl.reshape(b_at < b_end[:, None], [BN])
            b_at = tl.reshape(b_at, [BN])
            b_k = load_rows(gather_pointers(k_l, k_p, s_kn, s_pkn, b_at, P, HAS_PREFIX),
                            m_n, s_kd, D, BD)  # fmt: skip
            b_v = load_rows(gather_pointers(v_l, v_p, s_vn, s_pvn, b_at, P, HAS_PREFIX),
                            m_n, s_vd, D, BD)  # fmt: skip
            if HAS_MASK:
                m_n = tl.load(p_mask + b_at, mask=m_n, other=0) != 0
            m_rs = m_scored[:, None] & m_s[None, :]  # [BM, NS]
            b_slot = b_doc.to(tl.int64)[None, :] * M
            b_w = tl.load(p_weights[:, None] + b_doc[None, :], mask=m_rs, other=0.0)
            if BIAS:
                b_n = b_norm[:, None] - b_w
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
            b_factor = b_one
            if DQ:
                b_factor = tl.load(p_columns + FACTOR * M, mask=m_scored, other=0.0)
            else:
                b_norm = tl.load(p_state + C.to(tl.int64) * M, mask=m_scored, other=float("inf"))
                b_norm = tl.where(b_norm == float("-inf"), float("inf"), b_norm)
            b_sum = b_zero
            p_rest = rest + i_b.to(tl.int64) * T
            first_rest = tl.maximum(t_begin - n_tiles - n_packs, 0)
            for t in range(first_rest, t_end - n_tiles - n_packs):
                o_n = t * BN + tl.arange(0, BN)
                m_n = o_n < n_rest
                b_at = tl.load(p_rest + o_n, mask=m_n, other=0)
                b_k = load_rows(gather_pointers(k_l, k_p, s_kn, s_pkn, b_at, P, HAS_PREFIX),
                                m_n, s_kd, D, BD)  # fmt: skip
                b_v = load_rows(gather_pointers(v_l, v_p, s_vn, s_pvn, b_at, P, HAS_PREFIX),
                                m_n, s_vd, D, BD)  # fmt: skip
                if HAS_MASK:
                    m_n = tl.load(p_mask + b_at, mask=m_n, other=0) != 0
                m_s = m_n[None, :]
                if CAUSAL:
                    m_s = m_s & (b_at[None, :] <= b_pos[:, None])
                b_ds = logit_gradient(
                    b_q, b_do, b_k, b_v, m_s, b_norm, b_factor, b_offset, scale, True, IP
                )
                if DQ:
                    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=IP)
                else:
                    b_sum += tl.sum(b_ds, 1)
            if DOCUMENTS and FIXED:
                if SPLIT:
                    if t_end > n_tiles + n_packs:
                        tl.store(p_part + n_rows, b_sum, mask=m_scored)
                else:
                    tl.store(p_documents + C.to(tl.int64) * M, b_sum, mask=m_scored)

    if DQ:
        m_plain = m_r & (m_scored == 0)
        if tl.max(m_plain.to(tl.int32), 0) > 0:
            n_visible = T
            n_clear = T
            if CAUSAL:
                n_visible = tl.maximum(tl.max(tl.where(m_plain, b_pos, -1), 0) + 1, 0)
                n_clear = tl.maximum(tl.min(tl.where(m_plain, b_pos, T), 0) + 1, 0)
            begin = n_visible * 0
            end = n_visible
            if SPLIT:
                begin, end = split_range((n_visible + BN - 1) // BN, i_s, S)
                begin, end = begin * BN, tl.minimum(end * BN, n_visible)
            b_norm = tl.load(p_columns + NORM * M, mask=m_plain, other=float("inf"))
            b_offset = tl.load(p_columns + OFFSET * M, mask=m_plain, other=0.0)
            if HAS_PREFIX:
                b_dq = _plain_gradient(
                    b_q, b_do, b_dq, b_norm, b_offset, b_pos, k_p, v_p, p_mask, s_pkn, s_kd,
                    s_pvn, s_vd, begin, tl.minimum(end, P), n_clear, scale,
                    D, BD, BN, CAUSAL, HAS_MASK, IP,
                )  # fmt: skip
            b_dq = _plain_gradient(
                b_q, b_do, b_dq, b_norm, b_offset, b_pos, k_l, v_l, p_mask, s_kn, s_kd,
                s_vn, s_vd, tl.maximum(begin, P), end, n_clear, scale,
                D, BD, BN, CAUSAL, HAS_MASK, IP,
            )  # fmt: skip
        p_dq = dq + (i_s.to(tl.int64) * n_rows + b_row * M + o_m) * D
        store_rows(p_dq, b_dq * dq_scale, m_r, D, BD)


@triton.jit
def _plain_gradient(
    b_q, b_do, b_dq, b_norm, b_offset, b_pos, k, v, p_mask, s_kn, s_kd, s_vn, s_vd,
    begin, end, n_clear, scale, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The query's gradient from the keys ``begin .. end`` that plain rows see in one segment."""
    b_one = b_norm * 0.0 + 1.0
    b_one = tl.where(b_norm == float("inf"), 0.0, b_one)
    clear = begin + tl.maximum(tl.minimum(end, n_clear) - begin, 0) // BN * BN
    for key0 in range(begin, clear, BN):
        o_n = key0 + tl.arange(0, BN)
        m_n = o_n < end
        o_k = o_n.to(tl.int64)
        b_k = load_rows(k + o_k * s_kn, m_n, s_kd, D, BD)
        b_v = load_rows(v + o_k * s_vn, m_n, s_vd, D, BD)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        b_ds = logit_gradient(
            b_q, b_do, b_k, b_v, m_n[None, :], b_norm, b_one, b_offset, scale, HAS_MASK, IP
        )
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    for key0 in range(clear, end, BN):
        o_n = key0 + tl.arange(0, BN)
        m_n = o_n < end
        o_k = o_n.to(tl.int64)
        b_k = load_rows(k + o_k * s_kn, m_n, s_kd, D, BD)
        b_v = load_rows(v + o_k * s_vn, m_n, s_vd, D, BD)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= b_pos[:, None])
        b_ds = logit_gradient(
            b_q, b_do, b_k, b_v, m_s, b_norm, b_one, b_offset, scale, True, IP
        )  # fmt: skip
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    return b_dq
