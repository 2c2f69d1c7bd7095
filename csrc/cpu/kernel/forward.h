// Forward of one row block: one sweep over the keys, segment by segment.
#pragma once

#include "segments.h"

namespace dream::cpu {
namespace {

// Running softmax of a row block over one segment; per lane the largest logit and the sum of
// exp(logit - largest).
struct Softmax {
  float peak[kMaxLanes];
  float total[kMaxLanes];
};

// Takes in the logits of one key block, turns them into exp(logit - peak), and gives the factor by
// which everything summed so far shrinks. Returns whether any lane does.
bool update_softmax(const KeyBlock& block, int64_t lanes, float* logits, Softmax* softmax,
                    float* shrink) {
  bool any = false;
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const Vec old_peak = load(softmax->peak + v);
    Vec peak = old_peak;
    for (int i = 0; i < block.count; ++i) peak = max(load(logits + i * lanes + v), peak);
    // A lane that has seen no key yet must not compute inf - inf.
    const Vec reference = peak == splat(-kInfinity) ? Vec{} : peak;
    const Vec factor = exp(old_peak - reference);
    Vec total = load(softmax->total + v) * factor;
    for (int i = 0; i < block.count; ++i) {
      const Vec p = exp(load(logits + i * lanes + v) - reference);
      total += p;
      store(logits + i * lanes + v, p);
    }
    store(softmax->peak + v, peak);
    store(softmax->total + v, total);
    store(shrink + v, factor);
    for (int lane = 0; lane < kWidth; ++lane) any |= !(shrink[v + lane] == 1.0f);
  }
  return any;
}

// Log-sum-exp of a segment's logits, -inf where no key is visible.
void finish_softmax(const Softmax& softmax, int64_t lanes, float* lse) {
  for (int64_t i = 0; i < lanes; ++i) lse[i] = softmax.total[i];
  log_in_place(lse, lanes);
  for (int64_t i = 0; i < lanes; ++i) {
    lse[i] = softmax.total[i] == 0.0f ? -kInfinity : softmax.peak[i] + lse[i];
  }
}

// Attention over one segment: leaves the sum of exp(logit - peak) v in w.segment_sum.
void attend_segment(const Problem& problem, const RowBlock& rows, const Segment& segment,
                    Workspace& w, Softmax* softmax) {
  const int64_t dim = padded_head_dim(problem), lanes = rows.lanes;
  fill(softmax->peak, lanes, -kInfinity);
  fill(softmax->total, lanes, 0.0f);
  float shrink[kMaxLanes];
  bool first = true;
  KeyBlocks blocks(segment, rows);
  for (KeyBlock block; blocks.next(&block); first = false) {
    compute_logits(problem, rows, block, w, w.logits);
    const bool shrinks = update_softmax(block, lanes, w.logits, softmax, shrink);
    if (shrinks && !first) scale_columns(w.segment_sum, dim, lanes, shrink);
    load_keys(problem, rows, block, problem.prefix_value, problem.value, w.value);
    multiply<Lies::kByColumns>(dim, lanes, block.count, w.value, dim, w.logits, lanes,
                               w.segment_sum, lanes, !first);
  }
  if (first) fill(w.segment_sum, dim * lanes, 0.0f);
}

// Adds the segment just attended to the mean over the documents in w.documents_sum, with weight
// exp(score) (reweight) or exp(score + lse) (bias). `documents` runs over those exponents.
void merge_document(const Problem& problem, const RowBlock& rows, const Segment& segment,
                    const Softmax& softmax, Workspace& w, Softmax* documents) {
  const int64_t lanes = rows.lanes, at = segment.slot * lanes;
  float keep[kMaxLanes], add[kMaxLanes];
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec weight = load(w.scores + at + v);
    if (problem.mode == Mode::kBias) weight += load(w.lse + at + v);
    const Vec old_peak = load(documents->peak + v);
    const Vec peak = max(weight, old_peak);
    const Vec reference = peak == splat(-kInfinity) ? Vec{} : peak;
    const Vec kept = exp(old_peak - reference), added = exp(weight - reference);
    store(documents->peak + v, peak);
    store(documents->total + v, load(documents->total + v) * kept + added);
    store(keep + v, kept);
    store(add + v, added / load(softmax.total + v));
  }
  for (int64_t d = 0; d < padded_head_dim(problem); ++d) {
    for (int64_t v = 0; v < lanes; v += kWidth) {
      float* sum = w.documents_sum + d * lanes + v;
      store(sum, load(sum) * load(keep + v) + load(w.segment_sum + d * lanes + v) * load(add + v));
    }
  }
}

void forward(const Problem& problem, const BatchLayout& layout, const RowBlock& rows,
             const Operand& output, float* state, Workspace& w) {
  const int64_t dim = padded_head_dim(problem), lanes = rows.lanes;
  const int64_t slots = problem.documents + 1, rest = problem.documents * lanes;
  load_rows(problem, rows, problem.query, problem.scale, w.query_rows, w.query_columns);
  fill(w.lse, slots * lanes, -kInfinity);

  Softmax softmax, documents;
  fill(documents.peak, lanes, -kInfinity);
  fill(documents.total, lanes, 0.0f);
  const bool scored = rows.kind == RowKind::kScored;
  if (scored) {
    load_scores(problem, layout, rows, w);
    fill(w.documents_sum, dim * lanes, 0.0f);
    for (int64_t s = 0; s + 1 < layout.segment_count; ++s) {
      const Segment& segment = layout.segments[s];
      attend_segment(problem, rows, segment, w, &softmax);
      finish_softmax(softmax, lanes, w.lse + segment.slot * lanes);
      merge_document(problem, rows, segment, softmax, w, &documents);
    }
  }
  attend_segment(problem, rows, scored ? layout.segments[layout.segment_count - 1] : layout.all, w,
                 &softmax);
  finish_softmax(softmax, lanes, w.lse + rest);
  store_slots(problem, rows, w.lse, slots, state);

  compute_factors(problem, layout, rows, w);
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const Vec rest_factor = load(w.factor + rest + v) * inverse_or_zero(load(softmax.total + v));
    Vec documents_factor{};
    if (scored) {
      for (int64_t s = 0; s + 1 < layout.segment_count; ++s) {
        documents_factor += load(w.factor + layout.segments[s].slot * lanes + v);
      }
      documents_factor *= inverse_or_zero(load(documents.total + v));
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t at = d * lanes + v;
      Vec x = load(w.segment_sum + at) * rest_factor;
      if (scored) x += load(w.documents_sum + at) * documents_factor;
      store(w.segment_sum + at, x);
    }
  }
  store_rows(problem, rows, w.segment_sum, 1.0f, output);
}

void mass(const Problem& problem, const BatchLayout& layout, const RowBlock& rows, float* masses,
          Workspace& w) {
  const int64_t lanes = rows.lanes, slots = problem.documents + 1;
  load_rows(problem, rows, problem.query, problem.scale, w.query_rows, w.query_columns);
  Softmax softmax;
  float shrink[kMaxLanes];
  for (int64_t s = 0; s < layout.segment_count; ++s) {
    fill(softmax.peak, lanes, -kInfinity);
    fill(softmax.total, lanes, 0.0f);
    KeyBlocks blocks(layout.segments[s], rows);
    for (KeyBlock block; blocks.next(&block);) {
      compute_logits(problem, rows, block, w, w.logits);
      update_softmax(block, lanes, w.logits, &softmax, shrink);
    }
    finish_softmax(softmax, lanes, w.lse + layout.segments[s].slot * lanes);
  }
  fill(w.factor, slots * lanes, 0.0f);
  softmax_over_segments(layout, layout.segment_count, lanes, w.lse, w.factor);
  store_slots(problem, rows, w.factor, problem.documents, masses);
}

}  // namespace
}  // namespace dream::cpu
