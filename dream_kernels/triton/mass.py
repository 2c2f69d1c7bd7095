"""Per-document log-sum-exps of plain attention, from which ``document_mass`` follows."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COUNTS,
    FIRST,
    LAST,
    N_REST,
    N_REST_PREFIX,
    in_units,
    key_pointers,
    load_pack,
    load_query,
    load_rest,
    load_rows,
    load_tile,
    locate_rows,
    rest_tiles,
    segment_bases,
    work_share,
)
from dream_kernels.triton.options import far_positions, near_keys, products
from dream_kernels.triton.softmax import empty_softmax, finite, log_add


@triton.jit
def _tile_lse(b_s, m_s, scale):
    """``[BM]`` log-sum-exp of a tile in base 2, ``-inf`` for a row that sees none of it."""
    b_s = tl.where(m_s, b_s, float("-inf"))
    b_m = tl.max(b_s, 1) * scale
    return b_m + tl.log2(tl.sum(tl.exp2(b_s * scale - finite(b_m)[:, None]), 1))


@triton.jit(do_not_specialize=["window", "M", "T", "P", "C", "NT", "B", "Hq"])
def mass_kernel(
    q, k, pk, mask, positions, sinks, table, tiles, shorts, rest, counts, state,
    s_qb, s_qh, s_qm, s_qd, s_kb, s_kh, s_kn, s_kd, s_pkb, s_pkh, s_pkn,
    scale, window, cap, B, Hq, G, M, T, P, C, NT,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr,
    NEGATE: tl.constexpr, IP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``state`` ``[B, Hq, C + 1, M]``: every present document, and last all keys together.

    Grid ``(row blocks, Hkv, B)``. Unlike in the forward, rows may be inside documents.
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIT > 1:
        s_qb, s_qh, s_qm = in_units(s_qb, s_qh, s_qm, UNIT)
        s_kb, s_kh, s_kn = in_units(s_kb, s_kh, s_kn, UNIT)
        s_pkb, s_pkh, s_pkn = in_units(s_pkb, s_pkh, s_pkn, UNIT)
    m_r, _, _, o_h, o_m = locate_rows(i_m, i_h, i_b, table, B, M, G, BM, False)
    p_counts = counts + i_b * COUNTS
    b_pos = T - M + o_m
    b_q = load_query(q, i_b, o_h, o_m, m_r, s_qb, s_qh, s_qm, s_qd, D, BD, NEGATE)
    i_z = i_b.to(tl.int64)
    k_l, k_p = segment_bases(k, pk, i_h, P, s_kh, s_kn, s_pkh)
    k_l, k_p = k_l + i_z * s_kb, k_p + i_z * s_pkb
    p_mask = mask + i_z * T
    p_state = state + (i_z * Hq + o_h) * (C + 1) * M + o_m
    n_tiles, rest_begin, _, _ = work_share(p_counts, i_b, 1, BN, SLOT, False)
    b_all_m, b_all_l = empty_softmax(sinks, o_h, BM)
    b_far = None
    if window is not None:
        b_far = far_positions(window, positions, i_b, b_pos, m_r, T)
    b_all_m, b_all_l = _long_documents(
        b_q, b_all_m, b_all_l, b_pos, b_far, m_r, i_z, n_tiles, k_l, k_p, s_kn, s_pkn, s_kd, p_mask,
        positions, tiles, p_state, scale, cap, M, T, P, NT, D, BD, BM, BN, CAUSAL, HAS_PREFIX,
        HAS_MASK, IP,
    )  # fmt: skip
    b_all_m, b_all_l = _short_documents(
        b_q, b_all_m, b_all_l, b_pos, b_far, m_r, i_z, rest_begin - n_tiles, k_l, k_p, s_kn, s_pkn,
        s_kd, p_mask, positions, shorts, p_counts, p_state, scale, cap, M, T, C, D, BD, BM, BN,
        SLOT, CAUSAL, HAS_PREFIX, HAS_MASK, IP,
    )  # fmt: skip
    n_rest = rest_tiles(tl.load(p_counts + N_REST), tl.load(p_counts + N_REST_PREFIX), BN)
    for t in range(0, n_rest):
        b_n, m_n, inside, _ = load_rest(rest, p_counts, i_z, t, T, BN)
        p_k = key_pointers(k_l, k_p, s_kn, s_pkn, b_n, inside, HAS_PREFIX)
        b_k = load_rows(p_k, m_n, s_kd, D, BD)
        if HAS_MASK:
            m_n = tl.load(p_mask + b_n, mask=m_n, other=0) != 0
        b_s = products(b_q, b_k, cap, IP)
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (b_n[None, :] <= b_pos[:, None])
        if b_far is not None:
            m_s = m_s & near_keys(b_far, positions, i_z, T, b_n, m_n)
        b_all_m, b_all_l = log_add(b_all_m, b_all_l, _tile_lse(b_s, m_s, scale))
    tl.store(p_state + C.to(tl.int64) * M, b_all_m + tl.log2(b_all_l), mask=m_r)


@triton.jit
def _long_documents(
    b_q, b_all_m, b_all_l, b_pos, b_far, m_rows, i_z, n_tiles, k_l, k_p, s_kn, s_pkn, s_kd, p_mask,
    positions, tiles, p_state, scale, cap, M, T, P, NT, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The tiles of longer documents, each stored and added to the sum over all keys."""
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for t in range(0, n_tiles):
        key0, n, doc, flags = load_tile(tiles, i_z, NT, t)
        o_n = tl.arange(0, BN)
        m_n = o_n < n
        p_k = key_pointers(k_l, k_p, s_kn, s_pkn, key0 + o_n, key0 < P, HAS_PREFIX)
        b_k = load_rows(p_k, m_n, s_kd, D, BD)
        b_s = products(b_q, b_k, cap, IP)
        if HAS_MASK:
            m_n = tl.load(p_mask + key0 + o_n, mask=m_n, other=0) != 0
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & ((key0 + o_n)[None, :] <= b_pos[:, None])
        if b_far is not None:
            m_s = m_s & near_keys(b_far, positions, i_z, T, key0 + o_n, m_n)
        first = (flags & FIRST) != 0
        b_m = tl.where(first, float("-inf"), b_m)
        b_l = tl.where(first, 0.0, b_l)
        b_m, b_l = log_add(b_m, b_l, _tile_lse(b_s, m_s, scale))
        if (flags & LAST) != 0:
            b_lse = b_m + tl.log2(b_l)
            tl.store(p_state + doc.to(tl.int64) * M, b_lse, mask=m_rows)
            b_all_m, b_all_l = log_add(b_all_m, b_all_l, b_lse)
    return b_all_m, b_all_l


@triton.jit
def _short_documents(
    b_q, b_all_m, b_all_l, b_pos, b_far, m_rows, i_z, n_packs, k_l, k_p, s_kn, s_pkn, s_kd, p_mask,
    positions, shorts, p_counts, p_state, scale, cap, M, T, C, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_MASK: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The packs of short documents, each stored and added to the sum over all keys."""
    NS: tl.constexpr = BN // SLOT
    for t in range(0, n_packs):
        b_doc, m_doc, b_n, m_n, inside = load_pack(shorts, p_counts, i_z, t, C, BN, SLOT)
        p_k = key_pointers(k_l, k_p, s_kn, s_pkn, b_n, inside, HAS_PREFIX)
        b_k = load_rows(p_k, m_n, s_kd, D, BD)
        if HAS_MASK:
            m_n = tl.load(p_mask + b_n, mask=m_n, other=0) != 0
        b_s = products(b_q, b_k, cap, IP)
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (b_n[None, :] <= b_pos[:, None])
        if b_far is not None:
            m_s = m_s & near_keys(b_far, positions, i_z, T, b_n, m_n)
        b_s = tl.reshape(tl.where(m_s, b_s, float("-inf")), [BM, NS, SLOT]) * scale
        b_peak = tl.max(b_s, 2)  # [BM, NS]
        b_lse = b_peak + tl.log2(tl.sum(tl.exp2(b_s - finite(b_peak)[:, :, None]), 2))
        tl.store(
            p_state[:, None] + b_doc.to(tl.int64)[None, :] * M, b_lse,
            mask=m_rows[:, None] & m_doc[None, :],
        )  # fmt: skip
        b_top = tl.max(b_lse, 1)
        b_sum = tl.sum(tl.exp2(b_lse - finite(b_top)[:, None]), 1)
        b_all_m, b_all_l = log_add(b_all_m, b_all_l, b_top + tl.log2(b_sum))
    return b_all_m, b_all_l
