"""The loops over keys of the backward over rows, as in forward_walk.py."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    FIRST,
    LAST,
    PADDED,
    load_pack,
    load_pair,
    load_rest,
    load_run,
    load_tile,
)
from dream_kernels.triton.options import near_keys, products, through_cap


@triton.jit
def logit_gradient(
    b_q, b_do, b_k, b_v, b_norm, b_factor, b_offset, scale, cap, IP: tl.constexpr
):  # fmt: skip
    """``[BM, BN]``: ``exp(a - norm) (factor g + offset)``, of which every case is an instance.

    The second result is what ``through_cap`` takes.
    """
    b_s = products(b_q, b_k, cap, IP)
    b_g = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
    b_p = tl.exp2(b_s * scale - b_norm[:, None])
    return b_p * (b_g * b_factor[:, None] + b_offset[:, None]), b_s


@triton.jit
def long_document_gradients(
    b_q, b_do, b_dq, b_norm, b_offset, b_mu, m_z, i_z, n_tiles, begin, end,
    k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, tiles,
    p_weights, p_state, p_documents, p_part, n_rows, scale, cap, M, P, NT,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, DOCUMENTS: tl.constexpr, DQ: tl.constexpr,
    SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Visit the work list's tiles of long documents, up to ``n_tiles``, within ``begin .. end``."""
    b_zero = tl.zeros([BM], tl.float32)
    b_one = b_zero + 1.0
    b_inf = b_zero + float("inf")
    b_sum = b_zero
    begun = begin < 0  # whether the current document began in this split
    open_document = begin < 0
    for t in range(begin, tl.minimum(end, n_tiles)):
        key0, n, doc, flags = load_tile(tiles, i_z, NT, t)
        o_n = tl.arange(0, BN)
        m_n = o_n < n
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, key0 + o_n, m_n, key0 < P, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
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
        b_ds, b_s = logit_gradient(b_q, b_do, b_k, b_v, b_n, b_f, b_u, scale, cap, IP)
        if HAS_MASK:
            if (n < BN) | ((flags & PADDED) != 0):
                m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
                b_ds = tl.where(m_n[None, :], b_ds, 0.0)
        elif n < BN:
            b_ds = tl.where(m_n[None, :], b_ds, 0.0)
        if DQ:
            b_da = through_cap(b_ds, b_s, cap)
            b_dq = tl.dot(b_da.to(b_k.dtype), b_k, b_dq, input_precision=IP)
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
    return b_dq


@triton.jit
def long_documents_at_once(
    b_q, b_do, b_dq, b_norm, b_offset, b_mu, b_center, m_z, i_z, n_tiles,
    k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, tiles,
    p_weights, p_state, p_documents, scale, cap, M, P, NT,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FIXED: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """As :func:`long_document_gradients` for reweight, with ``dO . o_d`` made on the way."""
    b_zero = tl.zeros([BM], tl.float32)
    # The current document: sum of p k and of p g, factor, log-sum-exp, index or -1.
    b_part = tl.zeros([BM, BD], tl.float32)
    b_sum, b_open_f, b_open_n, current = b_zero, b_zero, b_zero, tl.minimum(n_tiles, 0) - 1
    for t in range(0, n_tiles):
        key0, n, doc, flags = load_tile(tiles, i_z, NT, t)
        o_n = tl.arange(0, BN)
        m_n = o_n < n
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, key0 + o_n, m_n, key0 < P, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
        )  # fmt: skip
        b_n = tl.load(p_state + doc.to(tl.int64) * M, mask=m_z, other=float("inf"))
        b_f = b_mu * tl.load(p_weights + doc)
        b_s = products(b_q, b_k, cap, IP)
        b_g = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
        b_p = tl.exp2(b_s * scale - b_n[:, None])
        if HAS_MASK:
            if (n < BN) | ((flags & PADDED) != 0):
                m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
                b_p = tl.where(m_n[None, :], b_p, 0.0)
        elif n < BN:
            b_p = tl.where(m_n[None, :], b_p, 0.0)
        b_ds = b_p * (b_g * b_f[:, None] - (b_f * b_center)[:, None])
        # As in the forward, a document is closed when the next one opens.
        if (flags & FIRST) != 0:
            b_dq = _close_document(
                b_dq, b_part, b_sum, b_open_f, b_open_n, b_norm, b_offset, b_center, m_z, current,
                p_documents, M, FIXED,
            )  # fmt: skip
            b_part = tl.zeros([BM, BD], tl.float32)
            b_sum = tl.zeros([BM], tl.float32)
        b_sum += tl.sum(b_p * b_g, 1)
        b_open_f, b_open_n, current = b_f, b_n, doc
        b_da = through_cap(b_ds, b_s, cap)
        b_dq = tl.dot(b_da.to(b_k.dtype), b_k, b_dq, input_precision=IP)
        b_pa = through_cap(b_p, b_s, cap)
        b_part = tl.dot(b_pa.to(b_k.dtype), b_k, b_part, input_precision=IP)
    return _close_document(
        b_dq, b_part, b_sum, b_open_f, b_open_n, b_norm, b_offset, b_center, m_z, current,
        p_documents, M, FIXED,
    )  # fmt: skip


@triton.jit
def _close_document(
    b_dq, b_part, b_sum, b_factor, b_lse, b_norm, b_offset, b_center, m_rows, doc, p_documents, M,
    FIXED: tl.constexpr,
):  # fmt: skip
    """Complete the query's gradient of a document, none if ``doc`` is -1; store ``dO . o_d``."""
    if doc >= 0:
        tl.store(p_documents + doc.to(tl.int64) * M, b_sum, mask=m_rows)
    b_u = document_offset(
        b_sum - b_center, b_factor, b_lse, b_norm, b_center + b_offset, m_rows, FIXED
    )
    return b_dq + b_part * b_u[:, None]


@triton.jit
def document_offset(b_g, b_factor, b_lse, b_norm, b_shift, m_rows, FIXED: tl.constexpr):
    """What the gradients of a document's logits have besides ``exp(a - lse) factor g``.

    Args:
        b_g: ``dO . o_d``, less what ``g`` is counted from.
        b_norm: log-sum-exp of all keys.
        b_shift: ``dO . (o_documents - o)``.
    """
    b_u = -b_factor * b_g
    if not FIXED:
        # A masked row may have infinite log-sum-exps.
        b_u += tl.where(m_rows, tl.exp2(b_lse - b_norm), 0.0) * b_shift
    return b_u


@triton.jit
def short_document_gradients(
    b_q, b_do, b_dq, b_norm, b_offset, b_mu, b_center, m_z, i_z, n_tiles, rest_begin, begin, end,
    k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, shorts, p_counts,
    p_weights, p_state, p_documents, scale, cap, M, C,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    BIAS: tl.constexpr, FIXED: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr,
    DOCUMENTS: tl.constexpr, DQ: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Visit the work list's packs, ``n_tiles`` to ``rest_begin``, within ``begin .. end``."""
    NS: tl.constexpr = BN // SLOT
    for t in range(tl.maximum(begin, n_tiles), tl.minimum(end, rest_begin)):
        b_doc, m_doc, b_at, m_n, inside = load_pack(shorts, p_counts, i_z, t - n_tiles, C, BN, SLOT)
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, b_at, m_n, inside, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
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
        b_s = products(b_q, b_k, cap, IP)
        b_g = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
        b_a = tl.where(m_n[None, :], b_s, float("-inf"))
        b_ds = tl.exp2(tl.reshape(b_a, [BM, NS, SLOT]) * scale - b_n[:, :, None])
        b_g = tl.reshape(b_g, [BM, NS, SLOT])
        if BIAS:
            b_ds = b_ds * (b_g + b_offset[:, None, None])
            if DOCUMENTS:
                tl.store(p_documents[:, None] + b_slot, tl.sum(b_ds, 2), mask=m_rs)
        else:
            b_f = b_w * b_mu[:, None]
            if DOCUMENTS:
                b_sum = tl.sum(b_ds * b_g, 2)
                tl.store(p_documents[:, None] + b_slot, b_sum, mask=m_rs)
            if DQ:
                if DOCUMENTS:
                    b_shift = (b_center + b_offset)[:, None]
                    b_u = document_offset(b_sum, b_f, b_n, b_norm[:, None], b_shift, m_rs, FIXED)
                else:
                    b_u = tl.load(p_documents[:, None] + b_slot, mask=m_rs, other=0.0)
                b_ds = b_ds * (b_g * b_f[:, :, None] + b_u[:, :, None])
        if DQ:
            b_da = through_cap(tl.reshape(b_ds, [BM, BN]), b_s, cap)
            b_dq = tl.dot(b_da.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    return b_dq


@triton.jit
def rest_gradients(
    b_q, b_do, b_dq, b_norm, b_factor, b_offset, b_pos, b_far, i_z, begin, end,
    k_l, k_p, v_l, v_p, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd, p_mask, positions, rest, p_counts,
    scale, cap, T, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The query's gradient from tiles ``begin .. end`` of the rest."""
    for t in range(begin, end):
        b_at, m_n, inside, _ = load_rest(rest, p_counts, i_z, t, T, BN)
        b_k, b_v = load_pair(
            k_l, k_p, v_l, v_p, b_at, m_n, inside, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
            D, BD, HAS_PREFIX,
        )  # fmt: skip
        if HAS_MASK:
            m_n = tl.load(p_mask + b_at, mask=m_n, other=0) != 0
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (b_at[None, :] <= b_pos[:, None])
        if b_far is not None:
            m_s = m_s & near_keys(b_far, positions, i_z, T, b_at, m_n)
        b_ds, b_s = logit_gradient(b_q, b_do, b_k, b_v, b_norm, b_factor, b_offset, scale, cap, IP)
        b_da = through_cap(tl.where(m_s, b_ds, 0.0), b_s, cap)
        b_dq = tl.dot(b_da.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    return b_dq


@triton.jit
def plain_gradients(
    b_q, b_do, b_dq, b_norm, b_offset, b_pos, b_far, i_z, k, v, p_mask, positions, s_kn, s_kd,
    s_vn, s_vd, begin, end, n_clear, scale, cap, T, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The query's gradient from the keys ``begin .. end`` that plain rows see in one segment."""
    b_one = b_offset * 0.0 + 1.0
    clear = begin + tl.maximum(tl.minimum(end, n_clear) - begin, 0) // BN * BN
    for key0 in range(begin, clear, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        b_ds, b_s = logit_gradient(b_q, b_do, b_k, b_v, b_norm, b_one, b_offset, scale, cap, IP)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
            b_ds = tl.where(m_n[None, :], b_ds, 0.0)
        b_da = through_cap(b_ds, b_s, cap)
        b_dq = tl.dot(b_da.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    for key0 in range(clear, end, BN):
        o_n, m_n, b_k, b_v = load_run(k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D, BD, BN)
        if HAS_MASK:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= b_pos[:, None])
        if b_far is not None:
            m_s = m_s & near_keys(b_far, positions, i_z, T, o_n, m_n)
        b_ds, b_s = logit_gradient(b_q, b_do, b_k, b_v, b_norm, b_one, b_offset, scale, cap, IP)
        b_da = through_cap(tl.where(m_s, b_ds, 0.0), b_s, cap)
        b_dq = tl.dot(b_da.to(b_k.dtype), b_k, b_dq, input_precision=IP)
    return b_dq
