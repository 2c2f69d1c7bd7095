"""The loops over keys of the forward: long documents, packs of short ones, the rest, plain keys."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    FIRST,
    LAST,
    N_REST,
    N_REST_PREFIX,
    PADDED,
    load_pack,
    load_pair,
    load_rest,
    load_run,
    load_tile,
    rest_range,
    store_rows,
)
from dream_kernels.triton.options import near_keys, products
from dream_kernels.triton.softmax import finite, inverse, log_add, online_step


@triton.jit
def long_documents(
    b_q, b_acc, b_all_m, b_all_l, m_z, unlike, i_z, n_tiles, begin, end,
    k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, tiles,
    p_weights, p_state, part_o, part_lse, p_part, n_rows, scale, cap, M, P, NT,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Visit the work list's tiles of long documents, up to ``n_tiles``, within ``begin .. end``."""
    b_zero = tl.zeros([BM], tl.float32)
    # Reweight: the current document, its index or -1, weight if all rows have the same, and whether
    # it began in this split.
    b_part = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    current, b_weight, begun = tl.minimum(begin, 0) - 1, tl.load(p_weights), begin < 0
    last = tl.minimum(end, n_tiles) - 1
    for t in range(begin, last + 1):
        key0, n, doc, flags = load_tile(tiles, i_z, NT, t)
        o_n = tl.arange(0, BN)
        m_n = o_n < n
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, key0 + o_n, m_n, key0 < P, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
        )  # fmt: skip
        b_s = products(b_q, b_k, cap, IP)  # [BM, BN]
        if HAS_MASK:
            if (n < BN) | ((flags & PADDED) != 0):
                m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
                b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        elif n < BN:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        if FOLD:
            if unlike != 0:
                b_s = tl.where(m_z[:, None], b_s, float("-inf"))
        if BIAS:
            b_w = tl.load(p_weights + doc)
            b_all_m, b_all_l, b_acc = online_step(b_s, b_v, b_all_m, b_all_l, b_acc, b_w, scale, IP)
        else:
            # A document is closed only when the next one opens: the products with its last values
            # are still being computed until this tile's with the query are done.
            if (flags & FIRST) != 0:
                b_acc, b_all_m, b_all_l = _close_document(
                    b_acc, b_all_m, b_all_l, b_m, b_l, b_part, m_z, current,
                    b_weight, p_weights, begun, p_state, part_o, part_lse, p_part, n_rows, M,
                    D, BD, SPLIT,
                )  # fmt: skip
                b_m = tl.full([BM], float("-inf"), tl.float32)
                b_l = tl.zeros([BM], tl.float32)
                b_part = tl.zeros([BM, BD], tl.float32)
                begun = doc >= 0
                if p_weights.shape[0] == 1:  # see _close_document
                    b_weight = tl.load(p_weights + doc)
            current = doc
            b_m, b_l, b_part = online_step(b_s, b_v, b_m, b_l, b_part, b_zero, scale, IP)
    if not BIAS:
        if begin <= last:
            _, _, _, flags = load_tile(tiles, i_z, NT, last)
            if (flags & LAST) != 0:
                b_acc, b_all_m, b_all_l = _close_document(
                    b_acc, b_all_m, b_all_l, b_m, b_l, b_part, m_z, current, b_weight,
                    p_weights, begun, p_state, part_o, part_lse, p_part, n_rows, M, D, BD, SPLIT,
                )  # fmt: skip
            elif SPLIT:
                store_part(part_o, part_lse, p_part + 2 * n_rows, b_m, b_l, b_part, m_z, D, BD)
    return b_acc, b_all_m, b_all_l


@triton.jit
def _close_document(
    b_acc, b_all_m, b_all_l, b_m, b_l, b_part, m_rows, doc, b_weight, p_weights, begun,
    p_state, part_o, part_lse, p_part, n_rows, M,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Add a document, none if ``doc`` is -1, to the sums over documents; store its log-sum-exp.

    If it began in an earlier split, its end is stored instead, for the parts to be joined.
    """
    b_lse = b_m + tl.log2(b_l)
    complete = doc >= 0
    if p_weights.shape[0] > 1:
        # Rows of different weights: carried from tile to tile they would change layout beside the
        # products, which then wait for each other.
        b_weight = tl.load(p_weights + tl.maximum(doc, 0))
    if SPLIT:
        if complete & (begun == 0):
            store_part(part_o, part_lse, p_part + n_rows, b_m, b_l, b_part, m_rows, D, BD)
        complete = complete & begun
        b_weight = tl.where(begun, b_weight, 0.0)
        b_lse = tl.where(begun, b_lse, float("-inf"))
    if complete:
        tl.store(p_state + doc.to(tl.int64) * M, b_lse, mask=m_rows)
    b_acc += b_part * (b_weight * inverse(b_l))[:, None]
    b_all_m, b_all_l = log_add(b_all_m, b_all_l, b_lse)
    return b_acc, b_all_m, b_all_l


@triton.jit
def short_documents(
    b_q, b_acc, b_all_m, b_all_l, m_z, i_z, n_tiles, rest_begin, begin, end,
    k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, shorts, p_counts,
    p_weights, p_state, scale, cap, M, C,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    BIAS: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, FOLD: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Visit the work list's packs, ``n_tiles`` to ``rest_begin``, within ``begin .. end``."""
    NS: tl.constexpr = BN // SLOT
    for t in range(tl.maximum(begin, n_tiles), tl.minimum(end, rest_begin)):
        b_doc, m_doc, b_n, m_n, inside = load_pack(shorts, p_counts, i_z, t - n_tiles, C, BN, SLOT)
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, b_n, m_n, inside, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
        )  # fmt: skip
        if HAS_MASK:
            m_n = tl.load(p_mask + b_n, mask=m_n, other=0) != 0
        m_s = m_n[None, :]
        if FOLD:
            m_s = m_s & m_z[:, None]
        b_s = products(b_q, b_k, cap, IP)
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
    return b_acc, b_all_m, b_all_l


@triton.jit
def rest_keys(
    b_q, b_m, b_l, b_acc, b_has_rest, b_pos, b_far, m_scored, m_z, z, unlike, i_z, i_s, S,
    top_pos, low_pos, k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
    p_mask, positions, rest, p_counts, scale, cap, T,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, FOLD: tl.constexpr,
    SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Visit keys of the rest in pass ``z``, for rows at positions from ``low_pos`` to ``top_pos``.

    Returns:
        b_m, b_l, b_acc: the online softmax.
        b_has_rest: above 0 for rows whose split reaches into the rest.
    """
    n_rest_prefix = tl.load(p_counts + N_REST_PREFIX)
    n_rest = tl.load(p_counts + N_REST)
    n_clear = n_rest
    if CAUSAL:
        # All documents end before a scored row, so the keys after it are of the rest.
        n_clear = n_rest - (T - 1 - low_pos)
        n_rest = n_rest - (T - 1 - top_pos)
    begin, end, reach = rest_range(
        p_counts, z, unlike, n_rest, b_far, positions, m_scored, T, i_s, S, BN, SLOT, FOLD, SPLIT
    )  # fmt: skip
    b_has_rest = tl.where(m_z, reach, b_has_rest)
    b_zero = tl.zeros([BM], tl.float32)
    for t in range(begin, end):
        b_n, m_n, inside, t_rank = load_rest(rest, p_counts, i_z, t, T, BN)
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, b_n, m_n, inside, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
        )  # fmt: skip
        b_s = products(b_q, b_k, cap, IP)
        if HAS_MASK:
            m_n = tl.load(p_mask + b_n, mask=m_n, other=0) != 0
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        if t_rank > tl.minimum(n_clear, tl.where(inside, n_rest_prefix, n_rest)):
            m_s = m_n[None, :]
            if CAUSAL:
                m_s = m_s & (b_n[None, :] <= b_pos[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        if b_far is not None:
            m_near = near_keys(b_far, positions, i_z, T, b_n, m_n)
            b_s = tl.where(m_near, b_s, float("-inf"))
        if FOLD:
            b_s = tl.where(m_z[:, None], b_s, float("-inf"))
        b_m, b_l, b_acc = online_step(b_s, b_v, b_m, b_l, b_acc, b_zero, scale, IP)
    return b_m, b_l, b_acc, b_has_rest


@triton.jit
def plain_keys(
    b_q, b_m, b_l, b_acc, m_rows, b_pos, b_far, i_z, k, v, p_mask, positions, s_kn, s_kd, s_vn,
    s_vd, begin, end, n_clear, scale, cap, T, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, FOLD: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Plain attention to the keys ``begin .. end`` of one segment of memory.

    The keys below ``n_clear`` are seen by every row, and their whole tiles take no mask.
    """
    b_zero = b_l * 0.0
    clear = begin + tl.maximum(tl.minimum(end, n_clear) - begin, 0) // BN * BN
    for key0 in range(begin, clear, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        b_s = products(b_q, b_k, cap, IP)
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
        b_s = products(b_q, b_k, cap, IP)
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= b_pos[:, None])
        if b_far is not None:
            m_s = m_s & near_keys(b_far, positions, i_z, T, o_n, m_n)
        if FOLD:
            m_s = m_s & m_rows[:, None]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_m, b_l, b_acc = online_step(b_s, b_v, b_m, b_l, b_acc, b_zero, scale, IP)
    return b_m, b_l, b_acc


@triton.jit
def store_part(
    part_o, part_lse, p_part, b_m, b_l, b_acc, m_rows, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write a softmax over some of the keys, normalised, with its log-sum-exp.

    ``part_lse`` is ``[S, 3, B * Hq * M]``, and ``part_o`` has ``D`` more elements to each. The
    three are the documents that are complete in a split, the end of a document that an earlier
    split began, and what continues in the next split or is the rest.
    """
    tl.store(part_lse + p_part, b_m + tl.log2(b_l), mask=m_rows)
    store_rows(part_o + p_part * D, b_acc * inverse(b_l)[:, None], m_rows, D, BD)
