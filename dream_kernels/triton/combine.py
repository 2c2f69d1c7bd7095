"""Joins the partial results of the forward's and the backward's splits, in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COUNTS,
    FIRST,
    LAST,
    load_rows,
    locate_scored_rows,
    store_rows,
    work_share,
)
from dream_kernels.triton.softmax import document_share, empty_softmax, finite, inverse, log_add


@triton.jit
def split_documents(p_counts, p_tiles, i_s, S, BN: tl.constexpr, SLOT: tl.constexpr):
    """The documents that are only partly in split ``i_s``.

    Returns:
        document: the one that the split's first tile belongs to.
        ends: whether that document began in an earlier split and ends in this one.
        opens: whether this split's last document continues in the next one.
        has_rest: whether the split reaches into the rest.
    """
    n_tiles, rest_begin, begin, end = work_share(p_counts, i_s, S, BN, SLOT, True)
    last = tl.minimum(end, n_tiles) - 1
    any_tile = begin <= last
    p_first, p_last = p_tiles + begin * 4, p_tiles + last * 4
    document = tl.load(p_first + 2, mask=any_tile, other=0)
    begun = (tl.load(p_first + 3, mask=any_tile, other=FIRST) & FIRST) != 0
    opens = (tl.load(p_last + 3, mask=any_tile, other=LAST) & LAST) == 0
    through = opens & (tl.load(p_last + 2, mask=any_tile, other=0) == document)
    ends = (begun | through) == 0
    return document, ends, opens, end > rest_begin


@triton.jit
def _merge(part_o, part_lse, p_part, m_rows, b_m, b_l, b_acc, D: tl.constexpr, BD: tl.constexpr):
    """Add a split's part to an online softmax."""
    b_lse = tl.load(part_lse + p_part, mask=m_rows, other=float("-inf"))
    b_o = load_rows(part_o + p_part * D, m_rows, 1, D, BD)
    b_new = tl.maximum(b_m, b_lse)
    b_safe = finite(b_new)
    b_alpha, b_beta = tl.exp2(b_m - b_safe), tl.exp2(b_lse - b_safe)
    return b_new, b_l * b_alpha + b_beta, b_acc * b_alpha[:, None] + b_o * b_beta[:, None]


@triton.jit(do_not_specialize=["M", "C", "NT", "S", "B", "Hq"])
def combine_kernel(
    part_o, part_lse, sinks, table, n_scored, tiles, counts, weights, o, o_part, state,
    document_mass, B, Hq, G, M, C, NT, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``o`` and ``state`` from the partial results of ``forward_kernel``; grid (rows, Hkv, B)."""
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m_r, _, o_h, o_m, m_scored = locate_scored_rows(
        i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM, False
    )  # fmt: skip
    p_counts = counts + i_b * COUNTS
    p_tiles = tiles + i_b.to(tl.int64) * NT * 4
    b_row = i_b.to(tl.int64) * Hq + o_h
    n_rows = B.to(tl.int64) * Hq * M
    n_slots = C * 0 + 1 if BIAS else C + 1
    p_state = state + b_row * n_slots * M + o_m
    p_last = p_state + (n_slots - 1).to(tl.int64) * M

    # One softmax over all keys: plain rows, and the scored ones of bias.
    m_whole = m_r
    if not BIAS:
        m_whole = m_r & (m_scored == 0)
    b_m, b_l = empty_softmax(sinks, o_h, BM)
    b_acc = tl.zeros([BM, BD], tl.float32)
    for s in range(0, S):
        i_s = S * 0 + s
        p_part = (i_s.to(tl.int64) * 3 + 2) * n_rows + b_row * M + o_m
        b_m, b_l, b_acc = _merge(part_o, part_lse, p_part, m_whole, b_m, b_l, b_acc, D, BD)
    tl.store(p_last, b_m + tl.log2(b_l), mask=m_whole)
    b_o = b_acc * inverse(b_l)[:, None]

    if not BIAS:
        if PER_HEAD:
            p_weights = weights + b_row * C
        else:
            p_weights = weights + i_b.to(tl.int64) * C + o_h * 0
        b_all, b_all_m, b_all_l, b_rest, b_rest_m, b_rest_l = _join_documents(
            part_o, part_lse, sinks, p_counts, p_tiles, p_weights, p_state, b_row, o_h, o_m,
            m_scored, n_rows, M, S, D, BD, BM, BN, SLOT,
        )  # fmt: skip
        b_rest = b_rest * inverse(b_rest_l)[:, None]
        if KEEP:
            p_kept = o_part + (b_row * M + o_m) * D
            store_rows(p_kept, b_rest if FIXED else b_all, m_scored, D, BD)
        b_lse = b_rest_m + tl.log2(b_rest_l)
        tl.store(p_last, b_lse, mask=m_scored)
        b_mu, b_other = document_share(b_all_m + tl.log2(b_all_l), b_lse, document_mass, FIXED)
        b_mixed = b_all * b_mu[:, None] + b_rest * b_other[:, None]
        b_o = tl.where(m_scored[:, None], b_mixed, b_o)
    store_rows(o + (b_row * M + o_m) * D, b_o, m_r, D, BD)


@triton.jit
def _join_documents(
    part_o, part_lse, sinks, p_counts, p_tiles, p_weights, p_state, b_row, o_h, o_m, m_rows,
    n_rows, M, S, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SLOT: tl.constexpr,
):  # fmt: skip
    """Walk the splits of the scored rows of reweight, and store documents that span several.

    Returns:
        b_all, b_all_m, b_all_l: the weighted outputs of the documents, and peak and relative sum
            of all their logits together.
        b_rest, b_rest_m, b_rest_l: the online softmax of the rest.
    """
    # The current document that spans splits.
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_all = tl.zeros([BM, BD], tl.float32)
    b_all_m = tl.full([BM], float("-inf"), tl.float32)
    b_all_l = tl.zeros([BM], tl.float32)
    b_rest = tl.zeros([BM, BD], tl.float32)
    b_rest_m, b_rest_l = empty_softmax(sinks, o_h, BM)
    for s in range(0, S):
        i_s = S * 0 + s
        p_part = i_s.to(tl.int64) * 3 * n_rows + b_row * M + o_m
        document, ends, opens, has_rest = split_documents(p_counts, p_tiles, i_s, S, BN, SLOT)
        if ends:
            b_m, b_l, b_acc = _merge(
                part_o, part_lse, p_part + n_rows, m_rows, b_m, b_l, b_acc, D, BD
            )
            b_lse = b_m + tl.log2(b_l)
            tl.store(p_state + document.to(tl.int64) * M, b_lse, mask=m_rows)
            b_w = tl.load(p_weights + document, mask=m_rows, other=0.0)
            b_all += b_acc * (b_w * inverse(b_l))[:, None]
            b_all_m, b_all_l = log_add(b_all_m, b_all_l, b_lse)
            b_m = tl.full([BM], float("-inf"), tl.float32)
            b_l = tl.zeros([BM], tl.float32)
            b_acc = tl.zeros([BM, BD], tl.float32)
        if opens:
            b_m, b_l, b_acc = _merge(
                part_o, part_lse, p_part + 2 * n_rows, m_rows, b_m, b_l, b_acc, D, BD
            )
        if has_rest:
            b_rest_m, b_rest_l, b_rest = _merge(
                part_o, part_lse, p_part + 2 * n_rows, m_rows,
                b_rest_m, b_rest_l, b_rest, D, BD,
            )  # fmt: skip
        b_lse = tl.load(part_lse + p_part, mask=m_rows, other=float("-inf"))
        b_all += load_rows(part_o + p_part * D, m_rows, 1, D, BD)
        b_all_m, b_all_l = log_add(b_all_m, b_all_l, b_lse)
    return b_all, b_all_m, b_all_l, b_rest, b_rest_m, b_rest_l


@triton.jit(do_not_specialize=["M", "C", "NT", "S", "B", "Hq"])
def join_kernel(
    parts, table, n_scored, tiles, counts, documents, B, Hq, G, M, C, NT, S,
    BM: tl.constexpr, BN: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Sum per document from the parts that ``rows_kernel`` has written; grid (rows, Hkv, B).

    Only documents that span splits are not complete yet.
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, _, o_h, o_m, m_scored = locate_scored_rows(
        i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM, False
    )  # fmt: skip
    p_counts = counts + i_b * COUNTS
    p_tiles = tiles + i_b.to(tl.int64) * NT * 4
    b_row = i_b.to(tl.int64) * Hq + o_h
    n_rows = B.to(tl.int64) * Hq * M
    p_documents = documents + b_row * (C + 1) * M + o_m
    b_sum = tl.zeros([BM], tl.float32)
    for s in range(0, S):
        i_s = S * 0 + s
        p_part = parts + i_s.to(tl.int64) * 2 * n_rows + b_row * M + o_m
        document, ends, opens, _has_rest = split_documents(p_counts, p_tiles, i_s, S, BN, SLOT)
        if ends:
            b_sum += tl.load(p_part, mask=m_scored, other=0.0)
            tl.store(p_documents + document.to(tl.int64) * M, b_sum, mask=m_scored)
            b_sum = tl.zeros([BM], tl.float32)
        if opens:
            b_sum += tl.load(p_part + n_rows, mask=m_scored, other=0.0)
