"""Building blocks that the kernels share: rows, key tiles, the share of a split."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.options import first_near

# Flags of a tile in the work list: it is the first of its document, it is the last, it has padding.
FIRST = tl.constexpr(1)
LAST = tl.constexpr(2)
PADDED = tl.constexpr(4)
# Entries of the work list's counts, per batch element.
N_TILES = tl.constexpr(0)
N_SHORT_PREFIX = tl.constexpr(1)
N_SHORT_LOCAL = tl.constexpr(2)
N_REST_PREFIX = tl.constexpr(3)
N_REST = tl.constexpr(4)
FIRST_ROW = tl.constexpr(5)
LIKE_FIRST = tl.constexpr(6)
FIRST_KEY = tl.constexpr(7)
COUNTS = tl.constexpr(8)
# Columns of the per-row coefficients.
NORM = tl.constexpr(0)
FACTOR = tl.constexpr(1)
OFFSET = tl.constexpr(2)
MU = tl.constexpr(3)
CENTER = tl.constexpr(4)
COLUMNS = tl.constexpr(5)


@triton.jit
def block_and_split(i_x, S, SPLIT: tl.constexpr):
    """The row block and the split of a program: both are in the first axis of the grid."""
    if SPLIT:
        return i_x // S, i_x % S
    else:
        return i_x, i_x * 0


@triton.jit
def locate_rows(i_m, i_h, i_z, table, B, M, G, BM: tl.constexpr, FOLD: tl.constexpr):
    """The rows of a tile: those of a key head's query heads, scored heads first.

    Within a head come the ``M`` rows of batch element ``i_z``, or with ``FOLD`` of all elements.

    Returns:
        ``[BM]`` each: validity, batch element, rank of the head in its group, query head, row.
    """
    o_r = i_m * BM + tl.arange(0, BM)
    o_m = o_r % M
    o_g = o_r // M
    if FOLD:
        m_r = o_r < G * B * M
        o_b = o_g % B
        o_g = o_g // B
    else:
        m_r = o_r < G * M
        o_b = o_g * 0 + i_z
    o_g = tl.where(m_r, o_g, 0)
    o_h = tl.load(table + i_h * G + o_g)
    return m_r, o_b, o_g, o_h, o_m


@triton.jit
def locate_scored_rows(
    i_m, i_h, i_b, table, n_scored, counts, B, M, G, BM: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """:func:`locate_rows`, and which of the rows are scored in place of the head's rank."""
    m_r, o_b, o_g, o_h, o_m = locate_rows(i_m, i_h, i_b, table, B, M, G, BM, FOLD)
    first_row = tl.load(counts + o_b * COUNTS + FIRST_ROW)  # [BM]
    m_scored = m_r & (o_g < tl.load(n_scored + i_h)) & (o_m >= first_row)
    return m_r, o_b, o_h, o_m, m_scored


@triton.jit
def fold_range(i_m, i_b, counts, m_r, o_b, B, M, G, BM: tl.constexpr, FOLD: tl.constexpr):
    """How often a tile visits its keys: passes over the batch elements that it has rows of.

    A folded tile visits the prefix once if its elements are alike in it, else once for each of
    them, and the local keys once for each.

    Returns:
        b_first: the element of the tile's first row; the others follow it cyclically.
        n_own: how many there are.
        n_common: passes over the prefix.
        unlike: 0 if all have the same documents and padding in the prefix and no document is
            elsewhere, else 1.
    """
    if FOLD:
        first = i_m * BM // M
        last = (tl.minimum((i_m + 1) * BM, G * B * M) - 1) // M
        b_alike = tl.load(counts + o_b * COUNTS + LIKE_FIRST, mask=m_r, other=1)
        b_first = first % B
        n_own = tl.minimum(last - first + 1, B)
        unlike = 1 - tl.min(b_alike, 0)
        return b_first, n_own, 1 + (n_own - 1) * unlike, unlike
    else:
        return i_b, 1, 1, 0


@triton.jit
def fold_pass(i_pass, own, i_b, b_first, o_b, m_rows, B, FOLD: tl.constexpr):
    """The batch element and the rows of one pass of a tile, see :func:`fold_range`.

    Returns:
        i_z: the element, int64.
        m_z: ``[BM]`` which of ``m_rows`` the pass concerns: the element's own, or if ``own`` is 0,
            all.
    """
    b_z = i_b
    m_z = m_rows
    if FOLD:
        b_z = (b_first + i_pass) % B
        m_z = m_rows & ((o_b - b_z) * own == 0)
    return b_z.to(tl.int64), m_z


@triton.jit
def in_units(s_b, s_h, s_n, UNIT: tl.constexpr):
    """Strides that are multiples of ``UNIT`` elements, so that the compiler knows it.

    The launch tells it of multiples of 16 only, and of other rows it loads few elements at a time.
    """
    return s_b // UNIT * UNIT, s_h // UNIT * UNIT, s_n // UNIT * UNIT


@triton.jit
def row_pointers(base, o_b, o_h, o_m, s_b, s_h, s_m):
    """``[BM]`` pointers to rows of a ``[B, Hq, M, D]`` tensor with any strides."""
    return base + (o_b.to(tl.int64) * s_b + o_h.to(tl.int64) * s_h + o_m.to(tl.int64) * s_m)


@triton.jit
def load_rows(p_rows, m_rows, s_d, D: tl.constexpr, BD: tl.constexpr):
    """``[rows, BD]``: whole rows, zero where masked and beyond ``D``."""
    o_d = tl.arange(0, BD)
    m_d = m_rows[:, None] if D == BD else m_rows[:, None] & (o_d < D)[None, :]
    return tl.load(p_rows[:, None] + o_d[None, :] * s_d, mask=m_d, other=0.0)


@triton.jit
def load_query(
    q, o_b, o_h, o_m, m_rows, s_b, s_h, s_m, s_d, D: tl.constexpr, BD: tl.constexpr,
    NEGATE: tl.constexpr,
):  # fmt: skip
    """``[BM, BD]``: rows of the query, negated for a negative scale: the kernels' is positive."""
    b_q = load_rows(row_pointers(q, o_b, o_h, o_m, s_b, s_h, s_m), m_rows, s_d, D, BD)
    if NEGATE:
        b_q = -b_q
    return b_q


@triton.jit
def store_rows(p_rows, b_x, m_rows, D: tl.constexpr, BD: tl.constexpr):
    """Write ``[rows, BD]`` to rows that are contiguous."""
    o_d = tl.arange(0, BD)
    m_d = m_rows[:, None] if D == BD else m_rows[:, None] & (o_d < D)[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], b_x.to(p_rows.dtype.element_ty), mask=m_d)


@triton.jit
def weight_pointers(weights, b_row, o_b, i_b, C, PER_HEAD: tl.constexpr, FOLD: tl.constexpr):
    """``[BM]`` pointers to the weights of each row, or ``[1]`` if all rows share them."""
    if PER_HEAD:
        return weights + b_row * C
    elif FOLD:
        return weights + o_b * C
    else:
        return weights + i_b * C + tl.zeros([1], tl.int32)


@triton.jit
def split_range(n_work, i_s, S):
    """The tiles of split ``i_s`` out of ``S``."""
    begin = (n_work * i_s.to(tl.int64) // S).to(tl.int32)
    return begin, (n_work * (i_s + 1).to(tl.int64) // S).to(tl.int32)


@triton.jit
def visible_range(
    m_rows, b_pos, b_far, positions, T, i_s, S, BN: tl.constexpr, CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The keys ``begin .. end`` of a split that any row sees; all rows see those to ``n_clear``.

    With a window all keys take a mask, and where ``positions`` are given none is left out.
    """
    end = T
    n_clear = T
    if CAUSAL:
        end = tl.maximum(tl.max(tl.where(m_rows, b_pos, -1), 0) + 1, 0)
        n_clear = tl.maximum(tl.min(tl.where(m_rows, b_pos, T), 0) + 1, 0)
    begin = end * 0
    if b_far is not None:
        n_clear = begin
        if positions is None:
            begin = first_near(b_far, m_rows, T)
    if SPLIT:
        first, last = split_range(tl.cdiv(end - begin, BN), i_s, S)
        begin, end = begin + first * BN, tl.minimum(begin + last * BN, end)
    return begin, end, n_clear


@triton.jit
def segment_bases(local, prefix, i_h, P, s_h, s_n, s_ph):
    """Pointers to keys or values of a key head in both segments, for :func:`key_pointers`."""
    i_kh = i_h.to(tl.int64)
    return local + (i_kh * s_h - P.to(tl.int64) * s_n), prefix + i_kh * s_ph


@triton.jit
def key_pointers(local, prefix, s_n, s_pn, b_n, inside, HAS_PREFIX: tl.constexpr):
    """``[BN]`` pointers to the keys at positions ``b_n``, all ``inside`` the prefix or none.

    ``local`` and ``prefix`` are offset so that positions count from the start of the prefix. The
    segment is chosen once per tile: chosen key by key, pointers lose the 16-byte alignment.
    """
    o_n = b_n.to(tl.int64)
    if HAS_PREFIX:
        return tl.where(inside, prefix, local) + o_n * tl.where(inside, s_pn, s_n)
    else:
        return local + o_n * s_n


@triton.jit
def load_pair(
    k_l, k_p, v_l, v_p, b_n, m_n, inside, s_kn, s_pkn, s_vn, s_pvn, s_kd, s_vd,
    D: tl.constexpr, BD: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """``[BN, BD]`` each: keys and values at positions ``b_n``, see :func:`key_pointers`."""
    p_k = key_pointers(k_l, k_p, s_kn, s_pkn, b_n, inside, HAS_PREFIX)
    p_v = key_pointers(v_l, v_p, s_vn, s_pvn, b_n, inside, HAS_PREFIX)
    return load_rows(p_k, m_n, s_kd, D, BD), load_rows(p_v, m_n, s_vd, D, BD)


@triton.jit
def load_run(
    k, v, key0, end, s_kn, s_vn, s_kd, s_vd, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A tile of consecutive keys of one segment of memory, from ``key0`` and below ``end``.

    Returns:
        o_n: ``[BN]`` their positions, and m_n: which of them exist.
        b_k, b_v: ``[BN, BD]``.
    """
    o_n = key0 + tl.arange(0, BN)
    m_n = o_n < end
    o_k = o_n.to(tl.int64)
    b_k = load_rows(k + o_k * s_kn, m_n, s_kd, D, BD)
    return o_n, m_n, b_k, load_rows(v + o_k * s_vn, m_n, s_vd, D, BD)


@triton.jit
def work_share(p_counts, i_s, S, BN: tl.constexpr, SLOT: tl.constexpr, SPLIT: tl.constexpr):
    """The work list of a batch element (tiles, packs, the rest) and a split's share of it.

    Returns:
        n_tiles: tiles of documents.
        rest_begin: where the rest begins.
        t_begin, t_end: the share of split ``i_s``.
    """
    NS: tl.constexpr = BN // SLOT
    n_tiles = tl.load(p_counts + N_TILES)
    n_packs = tl.cdiv(tl.load(p_counts + N_SHORT_PREFIX), NS)
    n_packs += tl.cdiv(tl.load(p_counts + N_SHORT_LOCAL), NS)
    n_rest_prefix = tl.load(p_counts + N_REST_PREFIX)
    n_rest = tl.cdiv(n_rest_prefix, BN)
    n_rest += tl.cdiv(tl.load(p_counts + N_REST) - n_rest_prefix, BN)
    rest_begin = n_tiles + n_packs
    t_begin = n_tiles * 0
    t_end = rest_begin + n_rest
    if SPLIT:
        t_begin, t_end = split_range(t_end, i_s, S)
    return n_tiles, rest_begin, t_begin, t_end


@triton.jit
def load_tile(tiles, i_b, NT, t):
    """Tile ``t`` of a batch element: its first key, how many keys, document, flags."""
    p_tile = tiles + (i_b.to(tl.int64) * NT + t) * 4
    return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)


@triton.jit
def load_pack(shorts, p_counts, i_b, t, C, BN: tl.constexpr, SLOT: tl.constexpr):
    """Pack ``t``: ``BN / SLOT`` short documents, all of the prefix or all of the local keys.

    Returns:
        b_doc: ``[BN / SLOT]`` their indices, and m_doc: which of them exist.
        b_n: ``[BN]`` positions of the keys, and m_n: which of them exist.
        inside: whether they are in the prefix.
    """
    NS: tl.constexpr = BN // SLOT
    n_prefix = tl.load(p_counts + N_SHORT_PREFIX)
    inside = t < tl.cdiv(n_prefix, NS)
    # Those of the prefix are listed from the front, the local ones from the back.
    o_s = tl.where(inside, t, t - tl.cdiv(n_prefix, NS)) * NS + tl.arange(0, NS)
    m_doc = o_s < tl.where(inside, n_prefix, tl.load(p_counts + N_SHORT_LOCAL))
    p_short = shorts + (i_b.to(tl.int64) * C + tl.where(inside, o_s, C - 1 - o_s)) * 4
    b_doc = tl.load(p_short, mask=m_doc, other=0)
    b_start = tl.load(p_short + 1, mask=m_doc, other=0)
    b_length = tl.load(p_short + 2, mask=m_doc, other=0)
    o_l = tl.arange(0, SLOT)
    m_n = tl.reshape(o_l[None, :] < b_length[:, None], [BN])
    return b_doc, m_doc, tl.reshape(b_start[:, None] + o_l[None, :], [BN]), m_n, inside


@triton.jit
def load_rest(rest, p_counts, i_b, t, T, BN: tl.constexpr):
    """Tile ``t`` of the rest: positions and validity, whether in the prefix, and the end's rank."""
    n_prefix = tl.load(p_counts + N_REST_PREFIX)
    inside = t < tl.cdiv(n_prefix, BN)
    begin = tl.where(inside, t * BN, n_prefix + (t - tl.cdiv(n_prefix, BN)) * BN)
    o_n = begin + tl.arange(0, BN)
    m_n = o_n < tl.where(inside, n_prefix, tl.load(p_counts + N_REST))
    return tl.load(rest + i_b.to(tl.int64) * T + o_n, mask=m_n, other=0), m_n, inside, begin + BN


@triton.jit
def rest_tiles(n, n_prefix, BN: tl.constexpr):
    """How many tiles the first ``n`` keys of the rest take."""
    return tl.cdiv(tl.minimum(n, n_prefix), BN) + tl.cdiv(tl.maximum(n - n_prefix, 0), BN)


@triton.jit
def _first_near_rest(b_far, m_rows, p_counts, T, BN: tl.constexpr):
    """The tile of the rest from which on keys may be in the window of a row.

    The keys of the rest before key ``x`` are all ``x`` up to the first document, and after it at
    least ``x`` less the keys of all documents.
    """
    first = first_near(b_far, m_rows, T)
    n_inside = T - tl.load(p_counts + N_REST)
    rank = tl.minimum(first, tl.maximum(tl.load(p_counts + FIRST_KEY), first - n_inside))
    n_prefix = tl.load(p_counts + N_REST_PREFIX)
    after = tl.cdiv(n_prefix, BN) + (rank - n_prefix) // BN
    return tl.where(rank < n_prefix, rank // BN, after)


@triton.jit
def rest_range(
    p_counts, z, unlike, n_seen, b_far, positions, m_rows, T, i_s, S,
    BN: tl.constexpr, SLOT: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The tiles of the rest that a split visits in pass ``z``, and whether it reaches the rest.

    Pass 0 of a folded tile visits what its batch elements have in common, the prefix unless they
    are ``unlike`` in it; each other pass visits the keys of one element alone.

    Args:
        n_seen: how many keys of the rest any of ``m_rows`` sees.

    Returns:
        begin, end: the tiles.
        reach: above 0 if the split's share of the work list reaches into the rest.
    """
    _, rest_begin, t_begin, t_end = work_share(p_counts, i_s, S, BN, SLOT, SPLIT)
    n_prefix = tl.load(p_counts + N_REST_PREFIX)
    begin = tl.maximum(t_begin - rest_begin, 0)
    if b_far is not None:
        if positions is None:
            begin = tl.maximum(begin, _first_near_rest(b_far, m_rows, p_counts, T, BN))
    end = tl.minimum(t_end - rest_begin, rest_tiles(n_seen, n_prefix, BN))
    if FOLD:
        n_common = tl.cdiv(n_prefix, BN) * (1 - unlike)
        # No branch: it crashes the compiler of triton 3.2.
        begin = tl.where(z == 0, begin, tl.maximum(begin, n_common))
        end = tl.where(z == 0, tl.minimum(end, n_common), end)
    return begin, end, t_end - rest_begin
