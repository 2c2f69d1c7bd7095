"""The work list: the order in which the keys of a batch element are visited, made on the device.

Three launches make it from the spans, sorted by their starts, in O(T + C log C):
``list_documents_kernel`` scans the documents of each batch element, ``list_keys_kernel`` finds the
document of each tile and key by bisection of these sums, ``weights_kernel`` weighs the documents.
"""

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

# Rows of ``places``: where each document, in the order of their starts, begins and ends, the keys
# of documents and the tiles before it.
START = tl.constexpr(0)
END = tl.constexpr(1)
BEFORE = tl.constexpr(2)
TILE = tl.constexpr(3)
PLACES = tl.constexpr(4)


@triton.jit
def load_span(p_spans, o_c, m_c, T):
    """Start and end of documents, int32, clamped: unchecked spans must not lead out of bounds."""
    b_start = tl.load(p_spans + o_c * 2, mask=m_c, other=0)
    b_end = tl.load(p_spans + o_c * 2 + 1, mask=m_c, other=0)
    b_start = tl.minimum(tl.maximum(b_start, 0), T).to(tl.int32)
    return b_start, tl.maximum(tl.minimum(b_end, T).to(tl.int32), b_start)


@triton.jit
def _reach(b_past, b_reach, b_next_past, b_next_reach):
    """Combines the largest ends: of the documents before the last one, and of all."""
    return tl.maximum(b_reach, b_next_past), tl.maximum(b_reach, b_next_reach)


@triton.jit(do_not_specialize=["window", "M", "T", "P", "C"])
def list_documents_kernel(
    spans, order, places, shorts, counts, window, M, T, P, C,
    BN: tl.constexpr, SLOT: tl.constexpr, BC: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Place the documents of a batch element; grid ``(B,)``.

    Of spans that overlap, unchecked, the later one loses the keys that both have: what follows
    relies on documents that are disjoint, so that it stays within its memory.

    Args:
        order: ``[B, C]`` int64: the documents by their starts.

    Outputs, int32:
        places: ``[B, 4, C]`` by ``order``: start, end, keys of documents before it, tiles before
            it. A document longer than ``SLOT`` keys, or across the prefix's end, takes tiles of
            ``BN`` from its own start and again from the prefix's end.
        shorts: ``[B, C, 4]``: document, first key and keys of those of up to ``SLOT`` keys, from
            the front those in the prefix, from the back those after it.
        counts: ``[B, 8]``: tiles, short documents in the prefix and after it, keys of the rest in
            the prefix and all, first scored row, whether the spans are those of element 0 and no
            document reaches beyond the prefix, first key of a document, only with a window.
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_spans = spans + i_b * C * 2
    p_places = places + i_b * PLACES * C
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
        b_own_start, b_own_end = load_span(p_spans, o_c, m_c, T)
        b_start0, b_end0 = load_span(spans, o_c, m_c, T)
        n_unlike += tl.sum(((b_own_start != b_start0) | (b_own_end != b_end0)).to(tl.int32), 0)

        b_doc = tl.load(order + i_b * C + o_c, mask=m_c, other=0).to(tl.int32)
        b_start, b_end = load_span(p_spans, b_doc, m_c, T)
        b_past, b_reach = tl.associative_scan((b_end * 0, b_end), 0, _reach)
        b_start = tl.maximum(b_start, tl.maximum(b_past, last_end))
        b_end = tl.maximum(b_reach, last_end)
        b_length = tl.where(m_c, b_end - b_start, 0)

        b_fits = (b_length > 0) & (b_length <= SLOT)
        b_front = (b_fits & (b_end <= P)).to(tl.int32)
        b_back = (b_fits & (b_start >= P)).to(tl.int32)
        b_place = n_front + tl.cumsum(b_front, 0) - 1
        b_place = tl.where(b_back > 0, C - n_back - tl.cumsum(b_back, 0), b_place)
        p_short = shorts + (i_b * C + b_place) * 4
        m_short = (b_front + b_back) > 0
        tl.store(p_short, b_doc, mask=m_short)
        tl.store(p_short + 1, b_start, mask=m_short)
        tl.store(p_short + 2, b_length, mask=m_short)

        b_cut, b_head = _cut(b_start, b_end, P, BN)
        b_tiles = b_head + tl.cdiv(b_end - b_cut, BN)
        b_tiles = tl.where((b_length > 0) & (m_short == 0), b_tiles, 0)
        tl.store(p_places + START * C + o_c, b_start, mask=m_c)
        tl.store(p_places + END * C + o_c, b_end, mask=m_c)
        b_before = n_inside + tl.cumsum(b_length, 0) - b_length
        tl.store(p_places + BEFORE * C + o_c, b_before, mask=m_c)
        b_first = n_tiles + tl.cumsum(b_tiles, 0) - b_tiles
        tl.store(p_places + TILE * C + o_c, b_first, mask=m_c)

        n_tiles += tl.sum(b_tiles, 0)
        n_front += tl.sum(b_front, 0)
        n_back += tl.sum(b_back, 0)
        n_inside += tl.sum(b_length, 0)
        n_inside_prefix += tl.sum(tl.minimum(tl.maximum(P - b_start, 0), b_length), 0)
        last_end = tl.max(b_end, 0)
        if window is not None:
            first_key = tl.minimum(first_key, tl.min(tl.where(b_length > 0, b_start, T), 0))

    first_row = tl.where(n_inside == 0, M, 0)
    if CAUSAL:
        first_row = tl.where(n_inside == 0, M, tl.maximum(last_end - (T - M), 0))
    p_counts = counts + i_b * COUNTS
    tl.store(p_counts + N_TILES, n_tiles)
    tl.store(p_counts + N_SHORT_PREFIX, n_front)
    tl.store(p_counts + N_SHORT_LOCAL, n_back)
    tl.store(p_counts + N_REST_PREFIX, P - n_inside_prefix)
    tl.store(p_counts + N_REST, T - n_inside)
    tl.store(p_counts + FIRST_ROW, first_row)
    tl.store(p_counts + LIKE_FIRST, ((n_unlike == 0) & (last_end <= P)).to(tl.int32))
    if window is not None:
        tl.store(p_counts + FIRST_KEY, first_key)


@triton.jit
def _cut(b_start, b_end, P, BN: tl.constexpr):
    """Where documents are cut, at the prefix's end or not at all, and their tiles before it."""
    b_cut = tl.where((b_start < P) & (b_end > P), P, b_start)
    return b_cut, tl.cdiv(b_cut - b_start, BN)


@triton.jit
def _count_up_to(p_sorted, b_x, low, high):
    """How many of the ascending numbers are at most ``b_x``, known to be ``low .. high``."""
    b_count = b_x * 0 + low
    step = high - low
    # The largest power of two up to the width.
    step = step | (step >> 1)
    step = step | (step >> 2)
    step = step | (step >> 4)
    step = step | (step >> 8)
    step = step | (step >> 16)
    step = step - (step >> 1)
    while step > 0:
        b_next = b_count + step
        m_next = b_next <= high
        b_number = tl.load(p_sorted + b_next - 1, mask=m_next, other=0)
        b_count = tl.where(m_next & (b_number <= b_x), b_next, b_count)
        step = step >> 1
    return b_count


@triton.jit(do_not_specialize=["T", "P", "C", "NT", "n_blocks"])
def list_keys_kernel(
    order, places, mask, positions, tiles, rest, segment, counts, T, P, C, NT, n_blocks,
    BN: tl.constexpr, BX: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    REST: tl.constexpr, SEGMENT: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write tiles and key positions of one block of a batch element; grid ``(n_blocks * B,)``.

    Args:
        order: as in ``list_documents_kernel``.
        places: what it wrote.

    Outputs, int32:
        tiles: ``[B, NT, 4]``: first key, keys, document, flags; only with ``TILES``.
        rest: ``[B, T]``: the positions outside all documents, ascending; only with ``REST``.
        segment: ``[B, T]``: the document of each key, ``C`` for the rest; only with ``SEGMENT``.
        counts: with ``TILES`` whether element 0 has the same padding and positions in the prefix,
            too.
    """
    i_x = tl.program_id(0) % n_blocks
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    p_order = order + i_b * C
    p_places = places + i_b * PLACES * C
    o_x = i_x * BX + tl.arange(0, BX)
    m_x = o_x < T
    if REST or SEGMENT:
        low = _count_up_to(p_places + START * C, i_x * BX, C * 0, C)
        high = _count_up_to(p_places + START * C, tl.minimum(i_x * BX + BX, T), low, C)
        b_count = _count_up_to(p_places + START * C, o_x, low, high)
        m_after = m_x & (b_count > 0)  # a document begins here or before
        p_last = p_places + tl.maximum(b_count - 1, 0)
        b_start = tl.load(p_last + START * C, mask=m_after, other=0)
        b_end = tl.load(p_last + END * C, mask=m_after, other=0)
        m_inside = m_after & (o_x < b_end)
        row = i_b * T
        if SEGMENT:
            b_doc = tl.load(p_order + tl.maximum(b_count - 1, 0), mask=m_inside, other=0)
            tl.store(segment + row + o_x, tl.where(m_inside, b_doc.to(tl.int32), C), mask=m_x)
        if REST:
            b_before = tl.load(p_last + BEFORE * C, mask=m_after, other=0)
            b_rank = o_x - b_before - (tl.minimum(o_x, b_end) - tl.minimum(o_x, b_start))
            tl.store(rest + row + b_rank, o_x, mask=m_x & (m_inside == 0))
    if TILES:
        if i_x * BT < NT:
            _write_tiles(
                p_order, p_places, mask + i_b * T, tiles + i_b * NT * 4, counts + i_b * COUNTS,
                i_x, T, P, C, BN, BT, HAS_MASK,
            )  # fmt: skip
        n_unlike = i_x * 0
        if HAS_MASK:
            b_own = tl.load(mask + i_b * T + o_x, mask=o_x < P, other=0)
            b_first_own = tl.load(mask + o_x, mask=o_x < P, other=0)
            n_unlike += tl.sum((b_own != b_first_own).to(tl.int32), 0)
        if positions is not None:
            b_own_at = tl.load(positions + i_b * T + o_x, mask=o_x < P, other=0)
            b_first_at = tl.load(positions + o_x, mask=o_x < P, other=0)
            n_unlike += tl.sum((b_own_at != b_first_at).to(tl.int32), 0)
        tl.atomic_and(counts + i_b * COUNTS + LIKE_FIRST, 0, mask=n_unlike > 0)


@triton.jit
def _write_tiles(
    p_order, p_places, p_mask, p_tiles, p_counts, i_x, T, P, C,
    BN: tl.constexpr, BT: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write the tiles ``i_x * BT ...`` of a batch element."""
    o_t = i_x * BT + tl.arange(0, BT)
    m_t = o_t < tl.load(p_counts + N_TILES)
    b_place = _count_up_to(p_places + TILE * C, o_t, C * 0, C) - 1
    p_place = p_places + b_place
    b_start = tl.load(p_place + START * C, mask=m_t, other=0)
    b_end = tl.load(p_place + END * C, mask=m_t, other=0)
    b_t = o_t - tl.load(p_place + TILE * C, mask=m_t, other=0)
    b_cut, b_head = _cut(b_start, b_end, P, BN)
    m_head = b_t < b_head
    b_key0 = tl.where(m_head, b_start + b_t * BN, b_cut + (b_t - b_head) * BN)
    b_n = tl.minimum(tl.where(m_head, b_cut, b_end) - b_key0, BN)
    b_flags = tl.where(b_t == 0, FIRST, 0) + tl.where(b_key0 + b_n == b_end, LAST, 0)
    if HAS_MASK:
        o_n = tl.arange(0, BN)[None, :]
        m_n = m_t[:, None] & (o_n < b_n[:, None])
        b_token = tl.load(p_mask + b_key0[:, None] + o_n, mask=m_n, other=1)
        b_flags += tl.where(tl.min(b_token.to(tl.int32), 1) == 0, PADDED, 0)
    b_doc = tl.load(p_order + b_place, mask=m_t, other=0).to(tl.int32)
    p_tile = p_tiles + o_t * 4
    tl.store(p_tile, b_key0, mask=m_t)
    tl.store(p_tile + 1, b_n, mask=m_t)
    tl.store(p_tile + 2, b_doc, mask=m_t)
    tl.store(p_tile + 3, b_flags, mask=m_t)


# The strides of the scores are often C itself.
@triton.jit(do_not_specialize=["s_sb", "s_sh", "C", "HS"])
def weights_kernel(
    scores, spans, weights, s_sb, s_sh, s_sc, C, HS, BW: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Write the weights of the documents for one row of scores; grid ``(HS * B,)``.

    ``weights`` is ``[B, HS, C]`` float32: softmax of the scores over the present documents; for
    ``BIAS`` the scores in base 2.
    """
    i_h = tl.program_id(0) % HS
    i_b = (tl.program_id(0) // HS).to(tl.int64)
    p_spans = spans + i_b * C * 2
    p_scores = scores + (i_b * s_sb + i_h.to(tl.int64) * s_sh)
    p_weights = weights + (i_b * HS + i_h) * C
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
