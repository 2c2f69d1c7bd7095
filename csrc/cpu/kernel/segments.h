// Per-row arithmetic over the segments: weights, masses, and the factors of the output.
//
// Arrays are [C + 1, lanes], indexed by a segment's slot.
#pragma once

#include "products.h"

namespace dream::cpu {
namespace {

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

// The sink of every lane's head.
DREAM_INLINE void load_sinks(const Problem& problem, const RowBlock& rows, float* target) {
  const auto* sinks = static_cast<const float*>(problem.sinks.data);
  for (int r = 0; r < rows.lanes; ++r) {
    target[r] = sinks[rows.head[r < rows.count ? r : 0] * problem.sinks.strides[0]];
  }
}

// Softmax over the first `count` segments, of the first `columns` lanes; all 0 where every logit is
// -inf. `shares` may be `logits`.
void softmax_over_segments(const RowGroup& group, int64_t count, int64_t lanes, int64_t columns,
                           const float* logits, float* shares) {
  for (int64_t v = 0; v < columns; v += kWidth) {
    Vec peak = splat(-kInfinity);
    for (int64_t s = 0; s < count; ++s) {
      peak = max(load(logits + group.segments[s].slot * lanes + v), peak);
    }
    peak = peak == splat(-kInfinity) ? Vec{} : peak;
    Vec sum{};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = group.segments[s].slot * lanes + v;
      const Vec x = exp(load(logits + at) - peak);
      sum += x;
      store(shares + at, x);
    }
    const Vec inverse = inverse_or_zero(sum);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = group.segments[s].slot * lanes + v;
      store(shares + at, load(shares + at) * inverse);
    }
  }
}

// Sets w.lse to that of no keys: -inf, in the rest (or all keys) the row's sink.
void start_lse(const Problem& problem, const RowBlock& rows, Workspace& w) {
  const int64_t lanes = rows.lanes;
  fill(w.lse, (problem.documents + 1) * lanes, -kInfinity);
  if (problem.sinks.data == nullptr) return;
  load_sinks(problem, rows, w.lse + problem.documents * lanes);
}

// Sets w.scores of scored rows. In bias these are the scores, that of the rest being 0, all less
// the row's largest document score, so that differences between documents are exact however large
// both are. In reweight they are the documents' weights.
void load_scores(const Problem& problem, const RowBlock& rows, Workspace& w) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes, documents = group.segment_count - 1;
  const int64_t* strides = problem.scores.strides;
  const bool shared = problem.scores.shape[1] == 1;
  const float* source[kMaxLanes];
  float peak[kMaxLanes];
  bool uniform = true;
  for (int r = 0; r < rows.lanes; ++r) {
    const int row = r < rows.count ? r : 0;
    source[r] = static_cast<const float*>(problem.scores.data) + rows.batch[row] * strides[0] +
                (shared ? 0 : rows.head[row]) * strides[1];
    uniform &= source[r] == source[0];
    if (r > 0 && source[r] == source[r - 1]) {
      peak[r] = peak[r - 1];
      continue;
    }
    peak[r] = -kInfinity;
    for (int64_t s = 0; s < documents; ++s) {
      const float score = source[r][group.segments[s].slot * strides[2]];
      peak[r] = score > peak[r] ? score : peak[r];
    }
    if (peak[r] == -kInfinity) peak[r] = 0.0f;
  }
  fill(w.scores, (problem.documents + 1) * lanes, 0.0f);
  for (int64_t s = 0; s < documents; ++s) {
    const int64_t slot = group.segments[s].slot;
    float* target = w.scores + slot * lanes;
    if (uniform) {
      fill(target, lanes, source[0][slot * strides[2]] - peak[0]);
    } else {
      for (int64_t r = 0; r < lanes; ++r) target[r] = source[r][slot * strides[2]] - peak[r];
    }
  }
  for (int64_t r = 0; r < lanes; ++r) w.scores[problem.documents * lanes + r] = -peak[r];
  if (problem.mode == Mode::kBias) return;
  const int64_t different = uniform ? kWidth : lanes;
  softmax_over_segments(group, documents, lanes, different, w.scores, w.scores);
  for (int64_t s = 0; uniform && s < documents; ++s) {
    float* target = w.scores + group.segments[s].slot * lanes;
    fill(target, lanes, target[0]);
  }
}

// Sets w.factor, the f in o = sum over segments of f_s o_s, from w.lse and w.scores. In reweight with
// the reader's own mass, `masses` gets the segments' masses on the way; it may be w.factor.
void compute_factors(const Problem& problem, const RowBlock& rows, Workspace& w, float* masses) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes, rest = problem.documents * lanes;
  const int64_t segments = group.segment_count;
  if (rows.kind == RowKind::kPlain) return fill(w.factor + rest, lanes, 1.0f);
  if (problem.mode == Mode::kBias) {
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t at = group.segments[s].slot * lanes;
      for (int64_t i = at; i < at + lanes; ++i) w.factor[i] = w.lse[i] + w.scores[i];
    }
    return softmax_over_segments(group, segments, lanes, lanes, w.factor, w.factor);
  }
  if (!problem.fixed_mass) softmax_over_segments(group, segments, lanes, lanes, w.lse, masses);
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec mu{}, rest_mass{};
    if (problem.fixed_mass) {
      mu = load(w.lse + rest + v) == splat(-kInfinity) ? splat(1.0f) : splat(problem.document_mass);
      rest_mass = 1.0f - mu;
    } else {
      for (int64_t s = 0; s + 1 < segments; ++s) {
        mu += load(masses + group.segments[s].slot * lanes + v);
      }
      rest_mass = load(masses + rest + v);
    }
    for (int64_t s = 0; s + 1 < segments; ++s) {
      const int64_t at = group.segments[s].slot * lanes + v;
      store(w.factor + at, mu * load(w.scores + at));
    }
    store(w.factor + rest + v, rest_mass);
  }
}

DREAM_INLINE int64_t state_index(const Problem& problem, const RowBlock& rows, int r) {
  return (rows.batch[r] * problem.query_heads + rows.head[r]) * problem.rows + rows.row[r];
}

// Where the output of a segment is kept, in a contiguous [B, Hq, M, C + 1, D].
DREAM_INLINE char* segment_output(const Problem& problem, const RowBlock& rows, int r, int64_t slot,
                                  void* segment_outputs) {
  const int64_t index = state_index(problem, rows, r) * (problem.documents + 1) + slot;
  return static_cast<char*>(segment_outputs) +
         index * problem.head_dim * element_size(problem.dtype);
}

// Copies lanes to rows of a contiguous [B, Hq, M, slots] tensor.
void store_slots(const Problem& problem, const RowBlock& rows, const float* source, int64_t slots,
                 float* tensor) {
  lanes_to_rows(source, rows.lanes, rows.count, slots,
                [&](int r) { return tensor + state_index(problem, rows, r) * slots; });
}

// Copies rows of a contiguous [B, Hq, M, slots] tensor to lanes; lanes of no row get -inf.
void load_slots(const Problem& problem, const RowBlock& rows, const float* tensor, int64_t slots,
                float* target) {
  rows_to_lanes([&](int r) { return tensor + state_index(problem, rows, r) * slots; }, rows.count,
                slots, -kInfinity, target, rows.lanes);
}

}  // namespace
}  // namespace dream::cpu
