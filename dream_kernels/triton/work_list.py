"""The work list: the order in which the keys of a batch element are visited, made on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.blocks import (
    COUNTS,
    FIRST,
    FIRST_KEY,
    FIRST_ROW,
    LAST,
    LIKE_FIRST,
    N_REST,
    N_REST_PREFIX,
    N_SHORT_LOCAL,
    N_SHORT_PREFIX,
    N_TILES,
    PADDED,
)
from dream_kernels.triton.options import LOG2_E

# Keys of which a program compares padding and positions at once.
_COMPARED = tl.constexpr(2048)


@triton.jit
def load_span(p_spans, o_c, m_c, T):
    """Start and end of documents, int32, clamped: unchecked spans must not lead out of bounds."""
    b_start = tl.load(p_spans + o_c * 2, mask=m_c, other=0)
    b_end = tl.load(p_spans + o_c * 2 + 1, mask=m_c, other=0)
    b_start = tl.minimum(tl.maximum(b_start, 0), T).to(tl.int32)
    return b_start, tl.maximum(tl.minimum(b_end, T).to(tl.int32), b_start)


# The strides of the scores are often C itself.
@triton.jit(do_not_specialize=["s_sb", "s_sh", "window", "M", "T", "P", "C", "NT", "n_blocks"])
def work_list_kernel(
    spans, mask, positions, scores, tiles, shorts, rest, segment, counts, weights,
    s_sb, s_sh, s_sc, window, M, T, P, C, NT, n_blocks,
    BN: tl.constexpr, SLOT: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
    HS: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write one block of the work list, or the weights of the documents for one row of scores.

    Programs ``(x, b)`` with ``x < n_blocks`` write tiles and key positions ``x * BX ...``, the
    ``HS`` others the weights of ``scores[b, x - n_blocks]``.

    Outputs, int32 but for the weights:
        tiles: ``[B, NT, 4]``: first key, keys, document, flags. A document longer than ``SLOT``
            keys, or across the prefix's end, is cut into tiles of ``BN`` from its own start and
            again at the prefix's end.
        shorts: ``[B, C, 4]``: document, first key and keys of those of up to ``SLOT`` keys, from
            the front those in the prefix, from the back those after it.
        rest: ``[B, T]``: the positions outside all documents, ascending.
        segment: ``[B, T]``: the document of each key, ``C`` for the rest; only for ``SEGMENT``.
        counts: ``[B, 8]``: tiles, short documents in the prefix and after it, keys of the rest in
            the prefix and all, first scored row, whether spans, padding and positions of the prefix
            are those of element 0 and no document reaches beyond the prefix, first key of a
            document, only with a window.
        weights: ``[B, HS, C]`` float32: softmax of the scores over the present documents; for
            ``BIAS`` the scores in base 2.
    """
    i_x, i_b = tl.program_id(0), tl.program_id(1)
    p_spans = spans + i_b.to(tl.int64) * C * 2
    if i_x < n_blocks:
        _list_keys(
            spans, p_spans, mask, positions, tiles, shorts, rest, segment, counts, i_x, i_b,
            window, M, T, P, C, NT,
            BN, SLOT, BX, BC, CAUSAL, SEGMENT, HAS_MASK,
        )  # fmt: skip
    else:
        _weigh_documents(
            scores, weights, p_spans, i_x - n_blocks, i_b, s_sb, s_sh, s_sc, C, BW, HS, BIAS
        )  # fmt: skip


@triton.jit
def _list_keys(
    spans, p_spans, mask, positions, tiles, shorts, rest, segment, counts, i_x, i_b,
    window, M, T, P, C, NT, BN: tl.constexpr, SLOT: tl.constexpr, BX: tl.constexpr,
    BC: tl.constexpr, CAUSAL: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write tiles and positions ``i_x * BX ...``, and program 0 short documents and counts."""
    o_x = i_x * BX + tl.arange(0, BX)
    b_segment = tl.full([BX], 0, tl.int32) + C
    b_before = tl.zeros([BX], tl.int32)  # keys of documents before each position
    b_key0 = tl.zeros([BX], tl.int32)
    b_n = tl.zeros([BX], tl.int32)
    b_doc = tl.zeros([BX], tl.int32)
    b_flags = tl.zeros([BX], tl.int32)
    n_tiles = tl.program_id(0) * 0
    n_front = n_tiles
    n_back = n_tiles
    n_inside = n_tiles
    n_inside_prefix = n_tiles
    n_unlike = n_tiles
    last_end = n_tiles
    first_key = n_tiles + T
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        m_c = o_c < C
        b_start, b_end = load_span(p_spans, o_c, m_c, T)
        b_length = b_end - b_start
        b_past = o_x[:, None] - b_start[None, :]  # [BX, BC]
        b_in = (b_past >= 0) & (b_past < b_length[None, :])
        b_segment = tl.minimum(b_segment, tl.min(tl.where(b_in, o_c[None, :], C), 1))
        b_before += tl.sum(tl.minimum(tl.maximum(b_past, 0), b_length[None, :]), 1)

        b_front, b_back = _list_short(
            shorts, i_x, i_b, o_c, b_start, b_end, b_length, n_front, n_back, P, C, SLOT
        )  # fmt: skip
        b_tiles, b_key0, b_n, b_doc, b_flags = _cut_long(
            o_x, o_c, b_start, b_end, b_length, b_front, b_back, n_tiles, b_key0, b_n, b_doc,
            b_flags, P, BN,
        )  # fmt: skip
        n_tiles += tl.sum(b_tiles, 0)
        n_front += tl.sum(b_front, 0)
        n_back += tl.sum(b_back, 0)
        n_inside += tl.sum(b_length, 0)
        n_inside_prefix += tl.sum(tl.minimum(tl.maximum(P - b_start, 0), b_length), 0)
        b_start0, b_end0 = load_span(spans, o_c, m_c, T)
        n_unlike += tl.sum(((b_start != b_start0) | (b_end != b_end0)).to(tl.int32), 0)
        last_end = tl.maximum(last_end, tl.max(b_end, 0))
        if window is not None:
            first_key = tl.minimum(first_key, tl.min(tl.where(b_length > 0, b_start, T), 0))

    if HAS_MASK:
        o_k = b_key0[:, None] + tl.arange(0, BN)[None, :]
        m_k = tl.arange(0, BN)[None, :] < b_n[:, None]
        b_token = tl.load(mask + i_b.to(tl.int64) * T + o_k, mask=m_k, other=1)
        b_flags += tl.where(tl.min(b_token.to(tl.int32), 1) == 0, PADDED, 0)
    p_tiles = tiles + (i_b.to(tl.int64) * NT + o_x) * 4
    m_t = o_x < tl.minimum(n_tiles, NT)
    tl.store(p_tiles, b_key0, mask=m_t)
    tl.store(p_tiles + 1, b_n, mask=m_t)
    tl.store(p_tiles + 2, b_doc, mask=m_t)
    tl.store(p_tiles + 3, b_flags, mask=m_t)
    m_x = o_x < T
    row = i_b.to(tl.int64) * T
    if SEGMENT:
        tl.store(segment + row + o_x, b_segment, mask=m_x)
    # Of unchecked spans that overlap, keys count twice. The rest of each segment of memory has
    # places of its own, all of them written, so that no key is read from the wrong one.
    n_rest_prefix = tl.maximum(P - n_inside_prefix, 0)
    n_rest = n_rest_prefix + tl.maximum(T - P - (n_inside - n_inside_prefix), 0)
    m_prefix = o_x < P
    b_rank = o_x - b_before + tl.where(m_prefix, 0, n_rest_prefix - (P - n_inside_prefix))
    m_rank = (b_rank >= tl.where(m_prefix, 0, n_rest_prefix)) & (
        b_rank < tl.where(m_prefix, n_rest_prefix, n_rest)
    )
    tl.store(rest + row + b_rank, o_x, mask=m_x & (b_segment == C) & m_rank)
    if i_x == 0:
        _store_counts(
            counts, mask, positions, i_b, row, n_tiles, n_front, n_back, n_inside, n_rest_prefix,
            n_rest, n_unlike, last_end, first_key, window, M, T, P, NT, CAUSAL, HAS_MASK,
        )  # fmt: skip


@triton.jit
def _list_short(
    shorts, i_x, i_b, o_c, b_start, b_end, b_length, n_front, n_back, P, C, SLOT: tl.constexpr
):  # fmt: skip
    """List the short documents among ``o_c``, after ``n_front`` and ``n_back`` of earlier ones.

    Returns:
        b_front, b_back: ``[BC]`` 1 for a short document in the prefix, and for one after it.
    """
    b_fits = (b_length > 0) & (b_length <= SLOT)
    b_front = (b_fits & (b_end <= P)).to(tl.int32)
    b_back = (b_fits & (b_start >= P)).to(tl.int32)
    b_place = n_front + tl.cumsum(b_front, 0) - 1
    b_place = tl.where(b_back > 0, C - n_back - tl.cumsum(b_back, 0), b_place)
    if i_x == 0:
        p_short = shorts + (i_b.to(tl.int64) * C + b_place) * 4
        m_short = (b_front + b_back) > 0
        tl.store(p_short, o_c, mask=m_short)
        tl.store(p_short + 1, b_start, mask=m_short)
        tl.store(p_short + 2, b_length, mask=m_short)
    return b_front, b_back


@triton.jit
def _cut_long(
    o_x, o_c, b_start, b_end, b_length, b_front, b_back, n_tiles, b_key0, b_n, b_doc, b_flags, P,
    BN: tl.constexpr,
):  # fmt: skip
    """Cut the long documents among ``o_c`` into tiles, after ``n_tiles`` of earlier documents.

    Returns:
        b_tiles: ``[BC]`` how many tiles each takes.
        b_key0, b_n, b_doc, b_flags: ``[BX]`` of the tiles ``o_x``, completed by these documents'.
    """
    b_cut = tl.where((b_start < P) & (b_end > P), P, b_start)
    b_head = (b_cut - b_start + BN - 1) // BN  # tiles before the cut
    b_tiles = b_head + (b_end - b_cut + BN - 1) // BN
    b_tiles = tl.where((b_length > 0) & (b_front + b_back == 0), b_tiles, 0)
    b_first = n_tiles + tl.cumsum(b_tiles, 0) - b_tiles
    b_t = o_x[:, None] - b_first[None, :]  # [BX, BC]
    b_hit = (b_t >= 0) & (b_t < b_tiles[None, :])
    b_in_head = b_t < b_head[None, :]
    b_from = tl.where(
        b_in_head,
        b_start[None, :] + b_t * BN,
        b_cut[None, :] + (b_t - b_head[None, :]) * BN,
    )
    b_to = tl.where(b_in_head, b_cut[None, :], b_end[None, :])
    b_key0 += tl.sum(tl.where(b_hit, b_from, 0), 1)
    b_n += tl.sum(tl.where(b_hit, tl.minimum(b_to - b_from, BN), 0), 1)
    b_doc += tl.sum(tl.where(b_hit, o_c[None, :], 0), 1)
    b_edge = tl.where(b_t == 0, FIRST, 0) + tl.where(
        b_t == b_tiles[None, :] - 1, LAST, 0
    )  # fmt: skip
    b_flags += tl.sum(tl.where(b_hit, b_edge, 0), 1)
    return b_tiles, b_key0, b_n, b_doc, b_flags


@triton.jit
def _store_counts(
    counts, mask, positions, i_b, row, n_tiles, n_front, n_back, n_inside, n_rest_prefix, n_rest,
    n_unlike, last_end, first_key, window, M, T, P, NT, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write the counts of a batch element, whose padding begins at ``mask + row``."""
    first_row = tl.where(n_inside == 0, M, 0)
    if CAUSAL:
        first_row = tl.where(n_inside == 0, M, tl.maximum(last_end - (T - M), 0))
    p_counts = counts + i_b * COUNTS
    tl.store(p_counts + N_TILES, tl.minimum(n_tiles, NT))
    tl.store(p_counts + N_SHORT_PREFIX, n_front)
    tl.store(p_counts + N_SHORT_LOCAL, n_back)
    tl.store(p_counts + N_REST_PREFIX, n_rest_prefix)
    tl.store(p_counts + N_REST, n_rest)
    tl.store(p_counts + FIRST_ROW, first_row)
    if HAS_MASK:
        for n in range(0, P, _COMPARED):
            o_n = n + tl.arange(0, _COMPARED)
            b_own = tl.load(mask + row + o_n, mask=o_n < P, other=0)
            b_first_own = tl.load(mask + o_n, mask=o_n < P, other=0)
            n_unlike += tl.sum((b_own != b_first_own).to(tl.int32), 0)
    if positions is not None:
        for n in range(0, P, _COMPARED):
            o_n = n + tl.arange(0, _COMPARED)
            b_own_at = tl.load(positions + row + o_n, mask=o_n < P, other=0)
            b_first_at = tl.load(positions + o_n, mask=o_n < P, other=0)
            n_unlike += tl.sum((b_own_at != b_first_at).to(tl.int32), 0)
    if window is not None:
        tl.store(p_counts + FIRST_KEY, first_key)
    alike = (n_unlike == 0) & (last_end <= P)
    tl.store(p_counts + LIKE_FIRST, alike.to(tl.int32))


@triton.jit
def _weigh_documents(
    scores, weights, p_spans, i_h, i_b, s_sb, s_sh, s_sc, C,
    BW: tl.constexpr, HS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Write the weights of the documents for one row of scores."""
    p_scores = scores + (i_b.to(tl.int64) * s_sb + i_h.to(tl.int64) * s_sh)
    p_weights = weights + (i_b.to(tl.int64) * HS + i_h) * C
    b_m = tl.full([BW], float("-inf"), tl.float32)
    b_l = tl.zeros([BW], tl.float32)
    for c in range(0, C, BW):
        o_c = c + tl.arange(0, BW)
        b_s, m_present = _load_scores(p_scores, p_spans, o_c, s_sc, C)
        if BIAS:
            tl.store(p_weights + o_c, tl.where(m_present, b_s, 0.0), mask=o_c < C)
        else:
            b_new = tl.maximum(b_m, b_s)
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_l = b_l * tl.exp2(b_m - b_safe) + tl.exp2(b_s - b_safe)
            b_m = b_new
    if not BIAS:
        peak = tl.max(b_m, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(b_l * tl.exp2(b_m - peak), 0)
        total = tl.where(total > 0, total, 1.0)
        for c in range(0, C, BW):
            o_c = c + tl.arange(0, BW)
            b_s, m_present = _load_scores(p_scores, p_spans, o_c, s_sc, C)
            tl.store(p_weights + o_c, tl.exp2(b_s - peak) / total, mask=o_c < C)


@triton.jit
def _load_scores(p_scores, p_spans, o_c, s_sc, C):
    """Scores of the documents ``o_c`` in base 2, ``-inf`` for the absent ones."""
    m_c = o_c < C
    b_start = tl.load(p_spans + o_c * 2, mask=m_c, other=0)
    b_end = tl.load(p_spans + o_c * 2 + 1, mask=m_c, other=0)
    m_present = m_c & (b_end > b_start)
    b_s = tl.load(p_scores + o_c.to(tl.int64) * s_sc, mask=m_present, other=0.0)
    return tl.where(m_present, b_s * LOG2_E, float("-inf")), m_present
