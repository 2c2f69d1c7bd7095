// The gradient in the scores, and in the segments' log-sum-exps, once dO.o of every segment is known.
#pragma once

#include "segments.h"

namespace dream::cpu {
namespace {

// Plain rows and bias: f is a softmax, so t_s = f_s (mean_s - delta), which for a document is
// the gradient in its score, too.
void shifts_of_softmax(const Segment* segments, int64_t count, int64_t lanes, Workspace& w) {
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec delta{};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = segments[s].slot * lanes + v;
      delta += load(w.factor + at) * load(w.products_mean + at);
    }
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = segments[s].slot * lanes + v;
      const Vec shift = load(w.factor + at) * (load(w.products_mean + at) - delta);
      store(w.shift + at, shift);
      store(w.scores + at, shift);
    }
  }
}

// Reweight; w.shift holds the masses m, or zeros when they are fixed.
void shifts_of_reweight(const Problem& problem, const Segment* segments, int64_t count,
                        int64_t lanes, Workspace& w) {
  const int64_t rest = problem.documents * lanes;
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec documents_mean{}, mu{};
    for (int64_t s = 0; s + 1 < count; ++s) {
      const int64_t at = segments[s].slot * lanes + v;
      documents_mean += load(w.scores + at) * load(w.products_mean + at);
      mu += load(w.factor + at);
    }
    // delta = mu documents_mean + (1 - mu) rest_mean
    const Vec difference = documents_mean - load(w.products_mean + rest + v);
    const Vec documents_above_delta = load(w.factor + rest + v) * difference;
    for (int64_t s = 0; s + 1 < count; ++s) {
      const int64_t at = segments[s].slot * lanes + v;
      const Vec above = load(w.products_mean + at) - documents_mean;
      store(w.shift + at, load(w.shift + at) * documents_above_delta);
      store(w.scores + at, load(w.factor + at) * above);
    }
    store(w.shift + rest + v, -mu * difference * load(w.shift + rest + v));
  }
}

// From w.products_mean, the dO.o of every segment: sets w.shift, the t of the formula at the top of
// backward.h, and turns w.scores into the gradient in the scores. w.factor, and w.shift where the
// reader's own masses count, are those of compute_factors.
void compute_shifts(const Problem& problem, const RowBlock& rows, Workspace& w) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes;
  if (rows.kind == RowKind::kPlain) return shifts_of_softmax(&group.all, 1, lanes, w);
  if (problem.mode == Mode::kBias) {
    return shifts_of_softmax(group.segments, group.segment_count, lanes, w);
  }
  if (problem.fixed_mass) fill(w.shift, (problem.documents + 1) * lanes, 0.0f);
  shifts_of_reweight(problem, group.segments, group.segment_count, lanes, w);
}

// Sets w.shift of the segments [first, first + count) of scored rows from `delta`, dO.o of each lane,
// and from w.products_mean of these and, in reweight, of the rest.
void shifts_from_delta(const Problem& problem, const RowBlock& rows, int64_t first, int64_t count,
                       const float* delta, Workspace& w) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes, documents = group.segment_count - 1;
  const int64_t rest = problem.documents * lanes;
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const Vec above_rest = load(delta + v) - load(w.products_mean + rest + v);
    Vec documents_above_delta{};
    if (problem.mode == Mode::kReweight && !problem.fixed_mass) {
      // delta = mu documents_mean + (1 - mu) rest_mean, with the rest's factor being 1 - mu
      Vec mu{};
      for (int64_t s = 0; s < documents; ++s) {
        mu += load(w.factor + group.segments[s].slot * lanes + v);
      }
      documents_above_delta = above_rest * load(w.factor + rest + v) * inverse_or_zero(mu);
    }
    for (int64_t s = first; s < first + count; ++s) {
      const int64_t at = group.segments[s].slot * lanes + v;
      Vec shift{};
      if (problem.mode == Mode::kBias) {
        shift = load(w.factor + at) * (load(w.products_mean + at) - load(delta + v));
      } else if (!problem.fixed_mass) {
        shift = load(w.shift + at) * (s == documents ? -above_rest : documents_above_delta);
      }
      store(w.shift + at, shift);
    }
  }
}

// Sums the rows' [C, lanes] into their targets' [targets, C].
void sum_scores(const Problem& problem, const RowBlock& rows, const float* scores, float* sums) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes;
  fill(sums, rows.targets * problem.documents, 0.0f);
  for (int64_t s = 0; s + 1 < group.segment_count; ++s) {
    const int64_t slot = group.segments[s].slot;
    const float* row = scores + slot * lanes;
    if (rows.targets > 1) {
      for (int r = 0; r < rows.count; ++r) sums[rows.target[r] * problem.documents + slot] += row[r];
      continue;
    }
    // Lanes of no row have no gradient.
    Vec sum{};
    for (int64_t v = 0; v < lanes; v += kWidth) sum += load(row + v);
    sums[slot] = sum_of(sum);
  }
}

// The scores' gradient of scored rows without a pass over the keys.
void backward_of_scores(const Problem& problem, const RowBlock& rows, const float* state,
                        const void* segment_outputs, const Operand& grad_output,
                        float* score_sums, Workspace& w) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes, dim = padded_head_dim(problem);
  load_slots(problem, rows, state, problem.documents + 1, w.lse);
  load_scores(problem, rows, w);
  compute_factors(problem, rows, w, w.shift);
  FloatProducts::load_rows(problem, rows, grad_output, w.grad_rows);
  fill(w.products_mean, (problem.documents + 1) * lanes, 0.0f);
  for (int r = 0; r < rows.count; ++r) {
    const float* grad = w.grad_rows + r * dim;
    for (int64_t s = 0; s < group.segment_count; ++s) {
      const int64_t slot = group.segments[s].slot;
      const void* kept = segment_output(problem, rows, r, slot, const_cast<void*>(segment_outputs));
      load_row(problem.dtype, kept, 1, problem.head_dim, dim, w.key_block);
      Vec product{};
      for (int64_t d = 0; d < dim; d += kWidth) product += load(grad + d) * load(w.key_block + d);
      w.products_mean[slot * lanes + r] = sum_of(product);
    }
  }
  compute_shifts(problem, rows, w);
  sum_scores(problem, rows, w.scores, score_sums);
}

}  // namespace
}  // namespace dream::cpu
