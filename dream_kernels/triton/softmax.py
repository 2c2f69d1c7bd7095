"""The online softmax, in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

from dream_kernels.triton.options import LOG2_E


@triton.jit
def empty_softmax(sinks, o_h, BM: tl.constexpr):
    """``[BM]`` peak and relative sum before the first key: those of the head's sink, if any."""
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    if sinks is not None:
        b_m = tl.load(sinks + o_h) * LOG2_E
        b_l += 1.0
    return b_m, b_l


@triton.jit
def finite(b_m):
    """A peak to subtract: 0 in place of the ``-inf`` of a row that has seen no key."""
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def inverse(b_l):
    """``1 / l``, and 0 for the sum over no key."""
    return tl.where(b_l > 0, 1.0 / tl.where(b_l > 0, b_l, 1.0), 0.0)


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
def log_add(b_m, b_l, b_lse):
    """Add ``exp2(lse)`` to the sum ``l * exp2(m)`` of a peak ``m`` and a relative sum ``l``."""
    b_new = tl.maximum(b_m, b_lse)
    b_safe = finite(b_new)
    return b_new, b_l * tl.exp2(b_m - b_safe) + tl.exp2(b_lse - b_safe)


@triton.jit
def online_step(b_s, b_v, b_m, b_l, b_acc, b_bias, scale, IP: tl.constexpr):
    """One tile of the online softmax, in base 2.

    Args:
        b_s: ``[BM, BN]`` raw dot products, ``-inf`` for keys that the row does not see.
        b_v: ``[BN, BD]``.
        b_m: ``[BM]`` peak so far.
        b_l: ``[BM]`` sum relative to the peak.
        b_acc: ``[BM, BD]`` weighted sum of values relative to the peak.
        b_bias: ``[BM]`` added to every logit of the tile.
        scale: positive factor of the dot products, ``log2(e)`` included.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale + b_bias)
    b_safe = finite(b_new)
    b_p = tl.exp2(b_s * scale - (b_safe - b_bias)[:, None])  # [BM, BN]
    b_alpha = tl.exp2(b_m - b_safe)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=IP)
    return b_new, b_l, b_acc
