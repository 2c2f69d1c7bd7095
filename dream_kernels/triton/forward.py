"""The forward pass: online softmax document by document, split over the keys where rows are few."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COUNTS,
    FIRST,
    LAST,
    N_REST,
    N_REST_PREFIX,
    finite,
    fold_pass,
    fold_range,
    inverse,
    load_pack,
    load_pair,
    load_rest,
    load_rows,
    load_run,
    load_tile,
    locate_scored_rows,
    log_add,
    online_step,
    rest_range,
    row_pointers,
    segment_bases,
    store_rows,
    visible_range,
    weight_pointers,
    work,
)


@triton.jit(do_not_specialize=["M", "T", "P", "C", "NT", "S", "B", "Hq"])
def forward_kernel(
    q, k, v, pk, pv, mask, table, n_scored, tiles, shorts, rest, counts, weights,
    o, state, part_o, part_lse,
    s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd,
    s_pkb, s_pkh, s_pkn, s_pvb, s_pvh, s_pvn,
    scale, document_mass, B, Hq, G, M, T, P, C, NT, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """``o`` ``[B, Hq, M, D]`` and ``state`` for one block of rows, or one split of its keys.

    Grid ``(row blocks * S, Hkv, B)``, or with ``FOLD``, which needs a shared prefix,
    ``(row blocks of the whole batch * S, Hkv, 1)``. See README.md for the algorithm and the layout
    of the state and of the partial results that ``combine_kernel`` joins.
    """
    i_x, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m, i_s = i_x, i_x * 0
    if SPLIT:
        i_m, i_s = i_x // S, i_x % S
    m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
        i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
    )  # fmt: skip
    b_pos = T - M + o_m  # [BM] position of each row

    b_q = load_rows(row_pointers(q, o_b, o_h, o_m, s_qb, s_qh, s_qm), m_r, s_qd, D, BD)
    if NEGATE:
        b_q = -b_q
    k_l, k_p = segment_bases(k, pk, i_h, P, s_kh, s_kn, s_pkh)
    v_l, v_p = segment_bases(v, pv, i_h, P, s_vh, s_vn, s_pvh)
    # state [B, Hq, C + 1 or 1, M]: the documents, and last the rest or the whole softmax.
    n_slots = C * 0 + 1 if BIAS else C + 1
    b_row = o_b.to(tl.int64) * Hq + o_h  # [BM]
    p_state = state + b_row * n_slots * M + o_m
    # part_lse [S, 3, B * Hq * M], part_o [S, 3, B * Hq * M, D]: complete documents, the end of a
    # document that an earlier split began, and what goes on in the next split or is the rest.
    n_rows = B.to(tl.int64) * Hq * M
    p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
    # Where the rows are located anew: 0, but the compiler does not know, and so holds no pointers
    # in registers through the loops, from which they would spill.
    i_later = i_m + tl.minimum(T, 0)
    # A folded tile visits the prefix once if its batch elements are alike in it, else once for
    # each of them, and the local keys once for each.
    b_first = i_b
    n_own = 1
    n_common = 1
    unlike = 0
    if FOLD:
        b_first, n_own, unlike = fold_range(i_m, counts, m_r, o_b, B, M, G, BM)
        n_common = 1 + (n_own - 1) * unlike

    if tl.max(m_scored.to(tl.int32), 0) > 0:
        top_pos = tl.max(tl.where(m_scored, b_pos, 0), 0)
        low_pos = tl.min(tl.where(m_scored, b_pos, T), 0)
        b_acc = tl.zeros([BM, BD], tl.float32)  # bias: the softmax; reweight: finished documents
        b_all_m = tl.full([BM], float("-inf"), tl.float32)  # the logits of all documents together
        b_all_l = tl.zeros([BM], tl.float32)
        b_zero = tl.zeros([BM], tl.float32)
        p_weights = weight_pointers(weights, b_row, o_b, i_b, C, PER_HEAD, FOLD)

        for z in range(0, n_common):
            i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_scored, B, FOLD)
            k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
            v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
            p_counts = counts + i_z * COUNTS
            p_mask = mask + i_z * T
            n_tiles, n_behind, t_begin, t_end = work(p_counts, i_s, S, BN, SLOT, SPLIT)
            begun = t_begin < 0  # whether the document at hand began in this split
            open_document = t_begin < 0
            b_part = tl.zeros([BM, BD], tl.float32)  # reweight: the document at hand
            b_m = tl.full([BM], float("-inf"), tl.float32)
            b_l = tl.zeros([BM], tl.float32)
            for t in range(t_begin, tl.minimum(t_end, n_tiles)):
                key0, n, doc, flags = load_tile(tiles, i_z, NT, t)
                o_n = tl.arange(0, BN)
                m_n = o_n < n
                b_k, b_v = load_pair(
                    k_lz, k_pz, v_lz, v_pz, key0 + o_n, m_n, key0 < P, s_kn, s_pkn, s_vn, s_pvn,
                    s_kd, s_vd, D, BD, HAS_PREFIX,
                )  # fmt: skip
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)  # [BM, BN]
                if HAS_MASK:
                    m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
                elif n < BN:
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
                if FOLD:
                    if unlike != 0:
                        b_s = tl.where(m_z[:, None], b_s, float("-inf"))
                b_w = tl.load(p_weights + doc)
                if BIAS:
                    b_all_m, b_all_l, b_acc = online_step(
                        b_s, b_v, b_all_m, b_all_l, b_acc, b_w, scale, IP
                    )
                else:
                    first = (flags & FIRST) != 0
                    b_m = tl.where(first, float("-inf"), b_m)  # which empties b_part as well
                    begun = begun | first
                    b_m, b_l, b_part = online_step(b_s, b_v, b_m, b_l, b_part, b_zero, scale, IP)
                    open_document = (flags & LAST) == 0
                    closes = (flags & LAST) != 0
                    if SPLIT:
                        if closes & (begun == 0):
                            _store_part(part_o, part_lse, p_part + n_rows, b_part, b_m, b_l,
                                        m_z, D, BD)  # fmt: skip
                        closes = closes & begun
                    if closes:
                        b_lse = b_m + tl.log2(b_l)
                        tl.store(p_state + doc.to(tl.int64) * M, b_lse, mask=m_z)
                        b_acc += b_part * (b_w * inverse(b_l))[:, None]
                        b_all_m, b_all_l = log_add(b_all_m, b_all_l, b_lse)

            if SPLIT:
                if open_document:
                    _store_part(part_o, part_lse, p_part + 2 * n_rows, b_part, b_m, b_l,
                                m_z, D, BD)  # fmt: skip

            NS: tl.constexpr = BN // SLOT
            for t in range(tl.maximum(t_begin, n_tiles), tl.minimum(t_end, n_behind)):
                b_doc, m_doc, b_n, m_n, inside = load_pack(
                    shorts, p_counts, i_z, t - n_tiles, C, BN, SLOT
                )
                b_k, b_v = load_pair(
                    k_lz, k_pz, v_lz, v_pz, b_n, m_n, inside, s_kn, s_pkn, s_vn, s_pvn,
                    s_kd, s_vd, D, BD, HAS_PREFIX,
                )  # fmt: skip
                if HAS_MASK:
                    m_n = tl.load(p_mask + b_n, mask=m_n, other=0) != 0
                m_s = m_n[None, :]
                if FOLD:
                    m_s = m_s & m_z[:, None]
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
                b_s = tl.where(m_s, b_s, float("-inf"))
                b_s = tl.reshape(b_s, [BM, NS, SLOT]) * scale
                b_w = tl.load(p_weights[:, None] + b_doc[None, :], mask=m_doc[None, :], other=0.0)
                if BIAS:
                    b_s += b_w[:, :, None]
                    b_new = tl.maximum(b_all_m, tl.max(tl.max(b_s, 2), 1))
                    b_safe = finite(b_new)
                    b_p = tl.exp2(b_s - b_safe[:, None, None])
                    b_alpha = tl.exp2(b_all_m - b_safe)
                    b_all_m = b_new
                    b_all_l = b_all_l * b_alpha + tl.sum(tl.sum(b_p, 2), 1)
                    b_acc = b_acc * b_alpha[:, None]
                else:
                    b_peak = tl.max(b_s, 2)  # [BM, NS]
                    b_p = tl.exp2(b_s - finite(b_peak)[:, :, None])
                    b_sum = tl.sum(b_p, 2)
                    b_lse = b_peak + tl.log2(b_sum)
                    tl.store(
                        p_state[:, None] + b_doc.to(tl.int64)[None, :] * M, b_lse,
                        mask=m_z[:, None] & m_doc[None, :],
                    )  # fmt: skip
                    b_new = tl.maximum(b_all_m, tl.max(b_lse, 1))
                    b_safe = finite(b_new)
                    b_all_l = b_all_l * tl.exp2(b_all_m - b_safe) + tl.sum(
                        tl.exp2(b_lse - b_safe[:, None]), 1
                    )
                    b_all_m = b_new
                    b_p = b_p * (b_w * inverse(b_sum))[:, :, None]
                b_p = tl.reshape(b_p, [BM, BN])
                b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=IP)

        if BIAS:
            b_m, b_l, b_part = b_all_m, b_all_l, b_acc
        else:
            b_m = tl.full([BM], float("-inf"), tl.float32)
            b_l = tl.zeros([BM], tl.float32)
            b_part = tl.zeros([BM, BD], tl.float32)
        b_has_rest = o_b * 0  # in this split
        # Pass 0 is the prefix in common, pass z > 0 what is element z's own.
        for z in range(0 if FOLD else 1, n_own + 1):
            i_z, m_z = fold_pass(
                tl.maximum(z - 1, 0), z, i_b, b_first, o_b, m_scored, B, FOLD
            )  # fmt: skip
            k_lz, k_pz = k_l + i_z * s_kb, k_p + i_z * s_pkb
            v_lz, v_pz = v_l + i_z * s_vb, v_p + i_z * s_pvb
            p_counts = counts + i_z * COUNTS
            p_mask = mask + i_z * T
            n_rest_prefix = tl.load(p_counts + N_REST_PREFIX)
            n_rest = tl.load(p_counts + N_REST)
            n_clear = n_rest
            if CAUSAL:
                # All documents end before a scored row, so the keys behind it are of the rest.
                n_clear = n_rest - (T - 1 - low_pos)
                n_rest = n_rest - (T - 1 - top_pos)
            begin, end, reach = rest_range(
                p_counts, z, unlike, n_rest, i_s, S, BN, SLOT, FOLD, SPLIT
            )  # fmt: skip
            b_has_rest = tl.where(m_z, reach, b_has_rest)
            for t in range(begin, end):
                b_n, m_n, inside, t_rank = load_rest(rest, p_counts, i_z, t, T, BN)
                b_k, b_v = load_pair(
                    k_lz, k_pz, v_lz, v_pz, b_n, m_n, inside, s_kn, s_pkn, s_vn, s_pvn,
                    s_kd, s_vd, D, BD, HAS_PREFIX,
                )  # fmt: skip
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
                if HAS_MASK:
                    m_n = tl.load(p_mask + b_n, mask=m_n, other=0) != 0
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
                if t_rank > tl.minimum(n_clear, tl.where(inside, n_rest_prefix, n_rest)):
                    m_s = m_n[None, :]
                    if CAUSAL:
                        m_s = m_s & (b_n[None, :] <= b_pos[:, None])
                    b_s = tl.where(m_s, b_s, float("-inf"))
                if FOLD:
                    b_s = tl.where(m_z[:, None], b_s, float("-inf"))
                b_m, b_l, b_part = online_step(b_s, b_v, b_m, b_l, b_part, b_zero, scale, IP)

        m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
            i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        b_row = o_b.to(tl.int64) * Hq + o_h
        if SPLIT:
            p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
            m_rest = m_scored
            if not BIAS:
                m_rest = m_scored & (b_has_rest > 0)
                tl.store(part_lse + p_part, b_all_m + tl.log2(b_all_l), mask=m_scored)
                store_rows(part_o + p_part * D, b_acc, m_scored, D, BD)
            _store_part(part_o, part_lse, p_part + 2 * n_rows, b_part, b_m, b_l,
                        m_rest, D, BD)  # fmt: skip
        else:
            b_lse = b_m + tl.log2(b_l)
            p_last = state + (b_row * n_slots + n_slots - 1) * M + o_m
            tl.store(p_last, b_lse, mask=m_scored)
            if BIAS:
                b_o = b_part * inverse(b_l)[:, None]
            else:
                b_mu, b_rest = document_share(
                    b_all_m + tl.log2(b_all_l), b_lse, document_mass, FIXED
                )
                b_o = b_acc * b_mu[:, None] + b_part * (b_rest * inverse(b_l))[:, None]
            store_rows(o + (b_row * M + o_m) * D, b_o, m_scored, D, BD)

    m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
        i_later, i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
    )  # fmt: skip
    m_plain = m_r & (m_scored == 0)
    if tl.max(m_plain.to(tl.int32), 0) > 0:
        b_pos = T - M + o_m
        begin, end, n_clear = visible_range(m_plain, b_pos, T, i_s, S, BN, CAUSAL, SPLIT)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_part = tl.zeros([BM, BD], tl.float32)
        if HAS_PREFIX:
            for z in range(0, n_common):
                i_z, m_z = fold_pass(z, unlike, i_b, b_first, o_b, m_plain, B, FOLD)
                b_m, b_l, b_part = _plain_keys(
                    b_q, b_m, b_l, b_part, m_z, b_pos, k_p + i_z * s_pkb, v_p + i_z * s_pvb,
                    mask + i_z * T, s_pkn, s_kd, s_pvn, s_vd, begin, tl.minimum(end, P), n_clear,
                    scale, D, BD, BN, CAUSAL, HAS_MASK, FOLD, IP,
                )  # fmt: skip
        for z in range(0, n_own):
            i_z, m_z = fold_pass(z, 1, i_b, b_first, o_b, m_plain, B, FOLD)
            b_m, b_l, b_part = _plain_keys(
                b_q, b_m, b_l, b_part, m_z, b_pos, k_l + i_z * s_kb, v_l + i_z * s_vb,
                mask + i_z * T, s_kn, s_kd, s_vn, s_vd, tl.maximum(begin, P), end, n_clear,
                scale, D, BD, BN, CAUSAL, HAS_MASK, FOLD, IP,
            )  # fmt: skip
        m_r, o_b, o_h, o_m, m_scored = locate_scored_rows(
            i_later + tl.minimum(T, 0), i_h, i_b, table, n_scored, counts, B, M, G, BM, FOLD
        )  # fmt: skip
        m_plain = m_r & (m_scored == 0)
        b_row = o_b.to(tl.int64) * Hq + o_h
        if SPLIT:
            p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
            _store_part(
                part_o, part_lse, p_part + 2 * n_rows, b_part, b_m, b_l, m_plain, D, BD
            )  # fmt: skip
        else:
            p_last = state + (b_row * n_slots + n_slots - 1) * M + o_m
            tl.store(p_last, b_m + tl.log2(b_l), mask=m_plain)
            b_o = b_part * inverse(b_l)[:, None]
            store_rows(o + (b_row * M + o_m) * D, b_o, m_plain, D, BD)


@triton.jit
def document_share(b_documents, b_rest, document_mass, FIXED: tl.constexpr):
    """The mass of all documents together and that of the rest, from their log-sum-exps."""
    if FIXED:
        b_mu = tl.where(b_rest == float("-inf"), 1.0, document_mass)
        return b_mu, 1.0 - b_mu
    else:
        b_peak = finite(tl.maximum(b_documents, b_rest))
        b_d, b_r = tl.exp2(b_documents - b_peak), tl.exp2(b_rest - b_peak)
        b_scale = inverse(b_d + b_r)
        return b_d * b_scale, b_r * b_scale


@triton.jit
def _store_part(
    part_o, part_lse, p_part, b_acc, b_m, b_l, m_rows, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write a softmax over some of the keys, normalised, with its log-sum-exp."""
    tl.store(part_lse + p_part, b_m + tl.log2(b_l), mask=m_rows)
    store_rows(part_o + p_part * D, b_acc * inverse(b_l)[:, None], m_rows, D, BD)


@triton.jit
def _plain_keys(
    b_q, b_m, b_l, b_acc, m_rows, b_pos, k, v, p_mask, s_kn, s_kd, s_vn, s_vd, begin, end, n_clear,
    scale, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, FOLD: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Plain attention to the keys ``begin .. end`` of one segment of memory.

    The keys below ``n_clear`` are seen by every row, and their whole tiles take no mask.
    """
    b_zero = b_l * 0.0
    clear = begin + tl.maximum(tl.minimum(end, n_clear) - begin, 0) // BN * BN
    for key0 in range(begin, clear, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        if FOLD:
            b_s = tl.where(m_rows[:, None], b_s, float("-inf"))
        b_m, b_l, b_acc = online_step(b_s, b_v, b_m, b_l, b_acc, b_zero, scale, IP)
    for key0 in range(clear, end, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=IP)
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= b_pos[:, None])
        if FOLD:
            m_s = m_s & m_rows[:, None]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_m, b_l, b_acc = online_step(b_s, b_v, b_m, b_l, b_acc, b_zero, scale, IP)
    return b_m, b_l, b_acc
