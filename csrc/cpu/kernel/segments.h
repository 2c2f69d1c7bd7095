// Per-row arithmetic over the segments: weights, masses, and the factors of the output.
//
// Arrays are [C + 1, lanes], indexed by a segment's slot.
#pragma once

#include "blocks.h"

namespace dream::cpu {
namespace {

DREAM_INLINE bool is_document(const Problem& problem, const Segment& segment) {
  return segment.slot < problem.documents;
}

// 1 / x, and 0 for the empty sum.
DREAM_INLINE Vec inverse_or_zero(Vec x) { return x == Vec{} ? Vec{} : 1.0f / x; }

// Multiplies each lane of `count` rows by its factor.
DREAM_INLINE void scale_columns(float* columns, int64_t count, int64_t lanes, const float* factor) {
  for (int64_t d = 0; d < count; ++d) {
    for (int64_t v = 0; v < lanes; v += kWidth) {
      float* x = columns + d * lanes + v;
      store(x, load(x) * load(factor + v));
    }
  }
}

// Softmax over the first `count` segments; all 0 where every logit is -inf. `shares` may
// be `logits`.
void softmax_over_segments(const BatchLayout& layout, int64_t count, int64_t lanes,
                           const float* logits, float* shares) {
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec peak = splat(-kInfinity);
    for (int64_t s = 0; s < count; ++s) {
      peak = max(load(logits + layout.segments[s].slot * lanes + v), peak);
    }
    peak = peak == splat(-kInfinity) ? Vec{} : peak;
    Vec sum{};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = layout.segments[s].slot * lanes + v;
      const Vec x = exp(load(logits + at) - peak);
      sum += x;
      store(shares + at, x);
    }
    const Vec inverse = inverse_or_zero(sum);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = layout.segments[s].slot * lanes + v;
      store(shares + at, load(shares + at) * inverse);
    }
  }
}

// Sets w.scores of scored rows: the scores, that of the rest being 0, all less the row's largest
// document score, so that differences between documents are exact however large both are.
void load_scores(const Problem& problem, const BatchLayout& layout, const RowBlock& rows,
                 Workspace& w) {
  const int64_t lanes = rows.lanes, documents = layout.segment_count - 1;
  const int64_t* strides = problem.scores.strides;
  const bool shared = problem.scores.shape[1] == 1;
  fill(w.scores, (problem.documents + 1) * lanes, 0.0f);
  for (int r = 0; r < rows.count; ++r) {
    const float* scores = static_cast<const float*>(problem.scores.data) +
                          rows.batch * strides[0] + (shared ? 0 : rows.head[r]) * strides[1];
    float peak = -kInfinity;
    for (int64_t s = 0; s < documents; ++s) {
      const float score = scores[layout.segments[s].slot * strides[2]];
      peak = score > peak ? score : peak;
    }
    if (peak == -kInfinity) peak = 0.0f;
    for (int64_t s = 0; s < documents; ++s) {
      const int64_t slot = layout.segments[s].slot;
      w.scores[slot * lanes + r] = scores[slot * strides[2]] - peak;
    }
    w.scores[problem.documents * lanes + r] = -peak;
  }
}

// Sets w.factor, the f in o = sum over segments of f_s o_s, from w.lse and w.scores. In reweight
// w.scores becomes the documents' weights.
void compute_factors(const Problem& problem, const BatchLayout& layout, const RowBlock& rows,
                     Workspace& w) {
  const int64_t lanes = rows.lanes, rest = problem.documents * lanes;
  const int64_t segments = layout.segment_count;
  if (rows.kind == RowKind::kPlain) return fill(w.factor + rest, lanes, 1.0f);
  if (problem.mode == Mode::kBias) {
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t at = layout.segments[s].slot * lanes;
      for (int64_t i = at; i < at + lanes; ++i) w.factor[i] = w.lse[i] + w.scores[i];
    }
    return softmax_over_segments(layout, segments, lanes, w.factor, w.factor);
  }
  softmax_over_segments(layout, segments - 1, lanes, w.scores, w.scores);
  softmax_over_segments(layout, segments, lanes, w.lse, w.factor);
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec mu{};
    for (int64_t s = 0; s + 1 < segments; ++s) {
      mu += load(w.factor + layout.segments[s].slot * lanes + v);
    }
    if (problem.fixed_mass) {
      mu = load(w.lse + rest + v) == splat(-kInfinity) ? splat(1.0f) : splat(problem.document_mass);
      store(w.factor + rest + v, 1.0f - mu);
    }
    for (int64_t s = 0; s + 1 < segments; ++s) {
      const int64_t at = layout.segments[s].slot * lanes + v;
      store(w.factor + at, mu * load(w.scores + at));
    }
  }
}

DREAM_INLINE int64_t state_index(const Problem& problem, const RowBlock& rows, int r) {
  return (rows.batch * problem.query_heads + rows.head[r]) * problem.rows + rows.row[r];
}

// Copies lanes to rows of a contiguous [B, Hq, M, slots] tensor.
void store_slots(const Problem& problem, const RowBlock& rows, const float* source, int64_t slots,
                 float* tensor) {
  for (int r = 0; r < rows.count; ++r) {
    float* target = tensor + state_index(problem, rows, r) * slots;
    for (int64_t c = 0; c < slots; ++c) target[c] = source[c * rows.lanes + r];
  }
}

}  // namespace
}  // namespace dream::cpu
