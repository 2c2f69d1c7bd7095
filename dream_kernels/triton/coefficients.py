"""Per-row coefficients of the logits' gradients, and the gradient of the scores by row block."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    CENTER,
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
)
from dream_kernels.triton.softmax import document_share, finite
from dream_kernels.triton.work_list import load_span


@triton.jit(do_not_specialize=["M", "T", "C", "Hq"])
def coefficients_kernel(
    o, o_part, do, spans, scored, counts, weights, state, documents, columns, partial,
    s_ob, s_oh, s_om, s_od, document_mass, Hq, M, T, C,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    PER_HEAD: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCORES: tl.constexpr, LOGITS: tl.constexpr, FILL: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Fill ``columns`` ``[B, Hq, 5, M]``; grid ``(row blocks of one head, Hq, B)``.

    The gradient in the logit of key ``j`` is ``exp(a_j - norm) (factor g_j + offset)``. The
    columns hold norm, factor and offset of the keys outside the documents, or of all keys if they
    have one softmax; the mass of all documents; and ``dO . sum_d w_d o_d``, or with a fixed mass,
    which does not need it, ``dO . o``. ``FILL`` writes them. ``o_part`` holds that sum over
    documents, or with a fixed mass the output of the rest alone.

    With ``DOCUMENTS`` (reweight) ``documents`` holds ``dO . o_d``: ``LOGITS`` replaces it by the
    documents' offsets, and ``SCORES`` writes the rows' part of the scores' gradient to ``partial``
    ``[B, Hq, row blocks, C]``.
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIT > 1:
        s_ob, s_oh, s_om = in_units(s_ob, s_oh, s_om, UNIT)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_row = i_b.to(tl.int64) * Hq + i_h
    p_o = o + (b_row * M + o_m) * D
    b_o = load_rows(p_o, m_m, 1, D, BD)
    b_do = load_rows(row_pointers(do, i_b, i_h, o_m, s_ob, s_oh, s_om), m_m, s_od, D, BD)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)  # [BM]

    p_columns = columns + b_row * COLUMNS * M + o_m
    n_slots = C * 0 + 1 if BIAS else C + 1
    p_state = state + b_row * n_slots * M + o_m
    b_last = tl.load(p_state + (n_slots - 1).to(tl.int64) * M, mask=m_m, other=float("-inf"))
    # An infinite norm makes every term of a row that sees no key 0.
    b_norm = tl.where(b_last == float("-inf"), float("inf"), b_last)
    b_factor = tl.zeros([BM], tl.float32) + 1.0
    b_offset = -b_delta
    b_mu = tl.zeros([BM], tl.float32)
    b_center = b_delta

    if not BIAS:
        first_row = tl.load(counts + i_b * COUNTS + FIRST_ROW)
        m_scored = m_m & (o_m >= tl.where(tl.load(scored + i_h) != 0, first_row, M))
        if FILL and LOGITS:
            b_o = load_rows(o_part + (b_row * M + o_m) * D, m_scored, 1, D, BD)
            b_part = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
        p_documents = documents + b_row * (C + 1) * M + o_m
        p_spans = spans + i_b.to(tl.int64) * C * 2
        p_weights = weights + (b_row if PER_HEAD else i_b.to(tl.int64)) * C
        b_m, b_l, b_mean = _sums_over_documents(
            p_spans, p_weights, p_state, p_documents, m_scored, M, T, C, BM, BC, DOCUMENTS, FILL
        )  # fmt: skip
        if FILL:
            b_all = b_m + tl.log2(b_l)
            b_mu, b_rest = document_share(b_all, b_last, document_mass, FIXED)
            b_mu = tl.where(m_scored, b_mu, 0.0)
            if FIXED:
                b_factor = tl.where(m_scored, b_rest, b_factor)
                if LOGITS:
                    b_offset = tl.where(m_scored, -b_rest * b_part, b_offset)
            else:
                b_peak = finite(tl.maximum(b_all, b_last))
                b_total = tl.exp2(b_all - b_peak) + tl.exp2(b_last - b_peak)
                b_norm = tl.where(m_scored & (b_total > 0), b_peak + tl.log2(b_total), b_norm)
                if LOGITS:
                    b_center = b_part
        else:
            b_norm = tl.load(p_columns + NORM * M, mask=m_scored, other=float("inf"))
            b_mu = tl.load(p_columns + MU * M, mask=m_scored, other=0.0)

        if DOCUMENTS:
            _document_gradients(
                p_spans, p_weights, p_state, p_documents, partial, b_row, i_m, m_scored, b_mu,
                b_mean, b_delta, b_norm, M, T, C, BC, FIXED, SCORES, LOGITS,
            )  # fmt: skip

    if FILL:
        tl.store(p_columns + NORM * M, b_norm, mask=m_m)
        tl.store(p_columns + FACTOR * M, b_factor, mask=m_m)
        tl.store(p_columns + OFFSET * M, b_offset, mask=m_m)
        tl.store(p_columns + MU * M, b_mu, mask=m_m)
        tl.store(p_columns + CENTER * M, b_center, mask=m_m)


@triton.jit
def _sums_over_documents(
    p_spans, p_weights, p_state, p_documents, m_rows, M, T, C,
    BM: tl.constexpr, BC: tl.constexpr, DOCUMENTS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """``[BM]`` sums over the documents that are present.

    Returns:
        b_m, b_l: peak and relative sum of all their logits, with ``FILL``.
        b_mean: ``dO . sum_d w_d o_d``, 0 without ``DOCUMENTS``.
    """
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_mean = tl.zeros([BM], tl.float32)
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        b_start, b_end = load_span(p_spans, o_c, o_c < C, T)
        m_cm = (b_end > b_start)[:, None] & m_rows[None, :]  # [BC, BM]
        o_cm = o_c.to(tl.int64)[:, None] * M
        if FILL:
            b_lse = tl.load(p_state[None, :] + o_cm, mask=m_cm, other=float("-inf"))
            b_new = tl.maximum(b_m, tl.max(b_lse, 0))
            b_safe = finite(b_new)
            b_l = b_l * tl.exp2(b_m - b_safe) + tl.sum(tl.exp2(b_lse - b_safe[None, :]), 0)
            b_m = b_new
        if DOCUMENTS:
            b_w = tl.load(p_weights + o_c, mask=o_c < C, other=0.0)
            b_g = tl.load(p_documents[None, :] + o_cm, mask=m_cm, other=0.0)
            b_mean += tl.sum(b_w[:, None] * b_g, 0)
    return b_m, b_l, b_mean


@triton.jit
def _document_gradients(
    p_spans, p_weights, p_state, p_documents, partial, b_row, i_m, m_rows, b_mu, b_mean, b_delta,
    b_norm, M, T, C, BC: tl.constexpr, FIXED: tl.constexpr, SCORES: tl.constexpr,
    LOGITS: tl.constexpr,
):  # fmt: skip
    """Write the rows' part of the scores' gradient, and the documents' offsets."""
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        b_start, b_end = load_span(p_spans, o_c, o_c < C, T)
        m_cm = (b_end > b_start)[:, None] & m_rows[None, :]
        o_cm = o_c.to(tl.int64)[:, None] * M
        b_w = tl.load(p_weights + o_c, mask=o_c < C, other=0.0)
        b_g = tl.load(p_documents[None, :] + o_cm, mask=m_cm, other=0.0)
        b_f = b_mu[None, :] * b_w[:, None]
        if SCORES:
            b_ds = tl.sum(tl.where(m_cm, b_f * (b_g - b_mean[None, :]), 0.0), 1)
            p_partial = partial + (b_row * tl.num_programs(0) + i_m) * C + o_c
            tl.store(p_partial, b_ds, mask=o_c < C)
        if LOGITS:
            b_u = -b_f * b_g
            if not FIXED:
                b_lse = tl.load(p_state[None, :] + o_cm, mask=m_cm, other=float("-inf"))
                b_u += tl.exp2(b_lse - b_norm[None, :]) * (b_mean - b_delta)[None, :]
            tl.store(p_documents[None, :] + o_cm, b_u, mask=m_cm)
