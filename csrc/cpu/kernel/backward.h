// Backward of one row block: a sweep that finds dO.o of every segment, from which all coefficients
// and the scores' gradient follow, and a second one for the gradients of query, key and value.
//
// With f the factors, p the probabilities inside the segment, g = dO.v and mean_s = dO.o_s, the
// gradient of a logit is p (f_s (g - mean_s) + t_s), as derived in dream_kernels/reference.py.
#pragma once

#include "segments.h"

namespace dream::cpu {
namespace {

DREAM_INLINE bool is_empty(const KeyRange& range) { return range.first == range.last; }

DREAM_INLINE bool overlaps(const KeyBlock& block, const KeyRange& range) {
  return block.position[0] < range.last && block.position[block.count - 1] >= range.first;
}

// One backward row block; w.lse and the row block's queries and gradients are in scratch.
class Backward {
 public:
  Backward(const Problem& problem, const BatchLayout& layout, const RowBlock& rows,
           bool wants_query, bool wants_scores, Workspace& workspace)
      : problem_(problem),
        rows_(rows),
        w_(workspace),
        segments_(rows.kind == RowKind::kScored ? layout.segments : &layout.all),
        segment_count_(rows.kind == RowKind::kScored ? layout.segment_count : 1),
        dim_(padded_head_dim(problem)),
        lanes_(rows.lanes),
        wants_query_(wants_query),
        wants_logits_(wants_query || !is_empty(workspace.key_range)),
        wants_products_(wants_logits_ || wants_scores) {}

  bool needs_second_sweep() const { return wants_logits_ || !is_empty(w_.value_range); }

  // Sets w.products_mean and w.correction. The saved log-sum-exps are rounded, which shifts all
  // probabilities of a row alike; dividing by their sum takes that out.
  void sweep_means() {
    // The other keys have no part in the weights' gradient.
    const bool documents_only = rows_.kind == RowKind::kScored &&
                                problem_.mode == Mode::kReweight && !needs_second_sweep();
    kept_ = 0;
    for (int64_t s = 0; s < segment_count_ - documents_only; ++s) {
      const Segment& segment = segments_[s];
      float* mean = w_.products_mean + segment.slot * lanes_;
      float* correction = w_.correction + segment.slot * lanes_;
      fill(mean, lanes_, 0.0f);
      fill(correction, lanes_, 0.0f);
      KeyBlocks blocks(segment, rows_);
      for (KeyBlock block; blocks.next(&block);) {
        const Matrices m = place(block);
        compute_probabilities(block, segment, m.probabilities);
        add_columns(block, m.probabilities, correction);
        if (!wants_products_) continue;
        compute_products(block, m.products);
        add_columns(block, m.probabilities, m.products, mean);
      }
      for (int64_t v = 0; v < lanes_; v += kWidth) {
        const Vec inverse = inverse_or_zero(load(correction + v));
        store(correction + v, inverse);
        store(mean + v, load(mean + v) * inverse);
      }
    }
  }

  // Sets w.shift, the t above, and turns w.scores into the gradient in the scores.
  void compute_shifts(const BatchLayout& layout) {
    if (rows_.kind == RowKind::kPlain || problem_.mode == Mode::kBias) return shifts_of_softmax();
    if (problem_.fixed_mass) {
      fill(w_.shift, (problem_.documents + 1) * lanes_, 0.0f);
    } else {
      softmax_over_segments(layout, segment_count_, lanes_, w_.lse, w_.shift);
    }
    shifts_of_reweight();
  }

  // Adds to the gradients of query (w.segment_sum), key and value.
  void sweep_gradients() {
    fill(w_.segment_sum, dim_ * lanes_, 0.0f);
    kept_ = 0;
    for (int64_t s = 0; s < segment_count_; ++s) {
      const Segment& segment = segments_[s];
      const int64_t at = segment.slot * lanes_;
      scale_columns(w_.factor + at, 1, lanes_, w_.correction + at);
      scale_columns(w_.shift + at, 1, lanes_, w_.correction + at);
      KeyBlocks blocks(segment, rows_);
      for (KeyBlock block; blocks.next(&block);) {
        const Matrices m = place(block);
        if (!m.retained) {
          compute_probabilities(block, segment, m.probabilities);
          if (wants_logits_) compute_products(block, m.products);
        } else if (wants_query_) {
          load_keys(problem_, rows_, block, problem_.prefix_key, problem_.key, w_.key);
        }
        add_gradients(block, segment, m);
      }
    }
  }

 private:
  // Where the probabilities and products of a block are: kept for the second sweep while there is
  // room, in scratch otherwise.
  struct Matrices {
    float* probabilities;
    float* products;
    bool retained;
  };

  Matrices place(const KeyBlock& block) {
    if (w_.retained == nullptr || kept_ + block.padded > w_.retained_keys) {
      return {w_.logits, w_.products, false};
    }
    float* base = w_.retained + 2 * kept_ * lanes_;
    kept_ += block.padded;
    return {base, base + block.padded * lanes_, true};
  }

  void compute_probabilities(const KeyBlock& block, const Segment& segment, float* p) {
    compute_logits(problem_, rows_, block, w_, p);
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      Vec lse = load(w_.lse + segment.slot * lanes_ + v);
      lse = lse == splat(-kInfinity) ? splat(kInfinity) : lse;
      for (int i = 0; i < block.count; ++i) {
        store(p + i * lanes_ + v, exp(load(p + i * lanes_ + v) - lse));
      }
    }
  }

  // Adds the sums of each column, of `a` or of `a` times `b`.
  void add_columns(const KeyBlock& block, const float* a, float* sums) const {
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      Vec sum = load(sums + v);
      for (int i = 0; i < block.count; ++i) sum += load(a + i * lanes_ + v);
      store(sums + v, sum);
    }
  }

  void add_columns(const KeyBlock& block, const float* a, const float* b, float* sums) const {
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      Vec sum = load(sums + v);
      for (int i = 0; i < block.count; ++i) {
        sum += load(a + i * lanes_ + v) * load(b + i * lanes_ + v);
      }
      store(sums + v, sum);
    }
  }

  void compute_products(const KeyBlock& block, float* products) {
    load_keys(problem_, rows_, block, problem_.prefix_value, problem_.value, w_.value);
    multiply<Lies::kByRows>(block.padded, lanes_, problem_.head_dim, w_.value, dim_,
                            w_.grad_columns, lanes_, products, lanes_, false);
  }

  // Plain rows and bias: f is a softmax, so t_s = f_s (mean_s - delta), which for a document is
  // the gradient in its score, too.
  void shifts_of_softmax() {
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      Vec delta{};
      for (int64_t s = 0; s < segment_count_; ++s) {
        const int64_t at = segments_[s].slot * lanes_ + v;
        delta += load(w_.factor + at) * load(w_.products_mean + at);
      }
      for (int64_t s = 0; s < segment_count_; ++s) {
        const int64_t at = segments_[s].slot * lanes_ + v;
        const Vec shift = load(w_.factor + at) * (load(w_.products_mean + at) - delta);
        store(w_.shift + at, shift);
        store(w_.scores + at, shift);
      }
    }
  }

  // Reweight; w.shift holds the masses m, or zeros when they are fixed.
  void shifts_of_reweight() {
    const int64_t rest = problem_.documents * lanes_;
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      Vec documents_mean{}, mu{};
      for (int64_t s = 0; s + 1 < segment_count_; ++s) {
        const int64_t at = segments_[s].slot * lanes_ + v;
        documents_mean += load(w_.scores + at) * load(w_.products_mean + at);
        mu += load(w_.factor + at);
      }
      // delta = mu documents_mean + (1 - mu) rest_mean
      const Vec difference = documents_mean - load(w_.products_mean + rest + v);
      const Vec documents_above_delta = load(w_.factor + rest + v) * difference;
      for (int64_t s = 0; s + 1 < segment_count_; ++s) {
        const int64_t at = segments_[s].slot * lanes_ + v;
        const Vec above = load(w_.products_mean + at) - documents_mean;
        store(w_.shift + at, load(w_.shift + at) * documents_above_delta);
        store(w_.scores + at, load(w_.factor + at) * above);
      }
      store(w_.shift + rest + v, -mu * difference * load(w_.shift + rest + v));
    }
  }

  void add_gradients(const KeyBlock& block, const Segment& segment, const Matrices& m) {
    const bool to_key = overlaps(block, w_.key_range);
    const bool to_value = overlaps(block, w_.value_range);
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      const Vec f = load(w_.factor + segment.slot * lanes_ + v);
      const Vec mean = load(w_.products_mean + segment.slot * lanes_ + v);
      const Vec shift = load(w_.shift + segment.slot * lanes_ + v);
      for (int i = 0; i < block.count; ++i) {
        const int64_t at = i * lanes_ + v;
        const Vec p = load(m.probabilities + at);
        if (wants_logits_) store(m.products + at, p * (f * (load(m.products + at) - mean) + shift));
        if (to_value) store(m.probabilities + at, p * f);
      }
    }
    if (wants_query_) {
      multiply<Lies::kByColumns>(dim_, lanes_, block.count, w_.key, dim_, m.products, lanes_,
                                 w_.segment_sum, lanes_, true);
    }
    if (to_key) add_key_rows(block, m.products, w_.query_rows, w_.key_range, w_.key_grad);
    if (to_value) add_key_rows(block, m.probabilities, w_.grad_rows, w_.value_range, w_.value_grad);
  }

  void add_key_rows(const KeyBlock& block, const float* coefficients, const float* by_row,
                    const KeyRange& range, float* sums) {
    multiply<Lies::kByRows>(block.padded, dim_, rows_.count, coefficients, lanes_, by_row, dim_,
                            w_.key_block_grad, dim_, false);
    for (int i = 0; i < block.count; ++i) {
      const int64_t position = block.position[i];
      if (position < range.first || position >= range.last) continue;
      float* sum = sums + (position - range.first) * dim_;
      const float* grad = w_.key_block_grad + i * dim_;
      for (int64_t d = 0; d < dim_; ++d) sum[d] += grad[d];
    }
  }

  const Problem& problem_;
  const RowBlock& rows_;
  Workspace& w_;
  const Segment* segments_;
  const int64_t segment_count_;
  const int64_t dim_;
  const int64_t lanes_;
  const bool wants_query_;
  const bool wants_logits_;    // logit gradients: for query or key
  const bool wants_products_;  // dO.v: for all but the value's gradient
  int64_t kept_ = 0;  // keys placed in w.retained so far
};

void load_state(const Problem& problem, const RowBlock& rows, const float* state, float* lse) {
  const int64_t slots = problem.documents + 1;
  fill(lse, slots * rows.lanes, -kInfinity);
  for (int r = 0; r < rows.count; ++r) {
    const float* source = state + state_index(problem, rows, r) * slots;
    for (int64_t c = 0; c < slots; ++c) lse[c * rows.lanes + r] = source[c];
  }
}

void backward(const Problem& problem, const BatchLayout& layout, const RowBlock& rows,
              const float* state, const Operand& grad_output, const Operand& grad_query,
              float* row_scores, Workspace& w) {
  const bool scored = rows.kind == RowKind::kScored;
  const int64_t slots = problem.documents + 1;
  load_rows(problem, rows, problem.query, problem.scale, w.query_rows, w.query_columns);
  load_rows(problem, rows, grad_output, 1.0f, w.grad_rows, w.grad_columns);
  load_state(problem, rows, state, w.lse);
  if (scored) load_scores(problem, layout, rows, w);
  compute_factors(problem, layout, rows, w);

  const bool wants_query = grad_query.data != nullptr;
  const bool wants_scores = scored && row_scores != nullptr;
  Backward pass(problem, layout, rows, wants_query, wants_scores, w);
  fill(w.products_mean, slots * rows.lanes, 0.0f);
  pass.sweep_means();
  pass.compute_shifts(layout);
  if (wants_scores) store_slots(problem, rows, w.scores, problem.documents, row_scores);
  if (!pass.needs_second_sweep()) return;
  pass.sweep_gradients();
  if (wants_query) store_rows(problem, rows, w.segment_sum, problem.scale, grad_query);
}

}  // namespace
}  // namespace dream::cpu
