// Backward of one row block: a sweep that finds dO.o of every segment, from which all coefficients
// and the scores' gradient follow, and a second one for the gradients of query, key and value. Of
// more keys than can be kept in between, both sweeps take some segments at a time.
//
// With f the factors, p the probabilities inside the segment, g = dO.v and mean_s = dO.o_s, the
// gradient of a logit is p (f_s (g - mean_s) + t_s), as derived in dream_kernels/reference.py.
#pragma once

#include "score_gradient.h"

namespace dream::cpu {
namespace {

DREAM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DREAM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

DREAM_INLINE bool is_empty(const KeyRange& range) { return range.first == range.last; }

// One backward row block; w.lse and the row block's queries and gradients are in scratch.
template <typename Products>
class Backward {
 public:
  Backward(const Problem& problem, const RowBlock& rows, bool wants_query, bool wants_scores,
           bool wants_sinks, Workspace& workspace)
      : problem_(problem),
        rows_(rows),
        group_(*rows.group),
        w_(workspace),
        segments_(rows.kind == RowKind::kScored ? group_.segments : &group_.all),
        segment_count_(rows.kind == RowKind::kScored ? group_.segment_count : 1),
        dim_(padded_head_dim(problem)),
        lanes_(rows.lanes),
        wants_query_(wants_query),
        wants_sinks_(wants_sinks),
        wants_logits_(wants_query || !is_empty(workspace.key_range)),
        wants_products_(wants_logits_ || wants_scores || wants_sinks) {}

  bool needs_second_sweep() const { return wants_logits_ || !is_empty(w_.value_range); }

  // Whether the first sweep over all keys can be kept for the second.
  bool fits() const { return room_for(0) == segment_count_; }

  // Both sweeps over all segments. Leaves the query's gradient in w.segment_sum, the scores' in
  // w.scores and the sinks' in w.sinks.
  void run() {
    start();
    // The other keys have no part in the weights' gradient.
    const bool documents_only = rows_.kind == RowKind::kScored && !wants_sinks_ &&
                                problem_.mode == Mode::kReweight && !needs_second_sweep();
    sweep_means(0, segment_count_ - documents_only);
    compute_shifts(problem_, rows_, w_);
    if (wants_sinks_) finish_sinks();
    if (needs_second_sweep()) sweep_gradients(0, segment_count_);
  }

  // The same, by groups of segments that can be kept: for more keys than that, computing them all
  // again would take as long as the second sweep. All that a segment needs to know of the others is
  // `delta`, dO.o of each lane, which the output gives.
  void run_in_groups(const float* delta) {
    start();
    if (rows_.kind == RowKind::kPlain) return sweep_plain(delta);
    const int64_t rest = segment_count_ - 1;
    run_group(rest, 1, delta);
    if (wants_sinks_) finish_sinks();
    for (int64_t s = 0; s < rest;) {
      const int64_t count = smaller(larger(room_for(s), 1), rest - s);
      run_group(s, count, delta);
      s += count;
    }
    compute_shifts(problem_, rows_, w_);
  }

 private:
  void start() {
    fill(w_.products_mean, (problem_.documents + 1) * lanes_, 0.0f);
    fill(w_.correction, (problem_.documents + 1) * lanes_, 0.0f);
    fill(w_.segment_sum, dim_ * lanes_, 0.0f);
    if (problem_.sinks.data != nullptr) start_sinks();
  }

  // The rest's sums start with its sink, whose value is 0. Leaves its probability in w.sinks.
  void start_sinks() {
    const int64_t rest = problem_.documents * lanes_;
    load_sinks(problem_, rows_, w_.sinks);
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      Vec lse = load(w_.lse + rest + v);
      lse = lse == splat(-kInfinity) ? splat(kInfinity) : lse;
      const Vec p = exp(load(w_.sinks + v) - lse);
      store(w_.sinks + v, p);
      store(w_.correction + rest + v, p);
    }
  }

  // Turns the sinks' probabilities into their gradient, that of a logit with g = 0. A rest of no
  // keys has the sink's probability, 1, as its sum.
  void finish_sinks() {
    const int64_t rest = problem_.documents * lanes_;
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      const Vec p = load(w_.sinks + v) * load(w_.correction + rest + v);
      const Vec above = load(w_.factor + rest + v) * load(w_.products_mean + rest + v);
      store(w_.sinks + v, p * (load(w_.shift + rest + v) - above));
    }
  }

  // How many segments from the first on can be kept together, the padding of their blocks included.
  int64_t room_for(int64_t first) const {
    int64_t keys = 0, s = first;
    for (; s < segment_count_; ++s) {
      const int64_t visible = visible_keys(rows_, segments_[s]);
      keys += visible + kKeyUnit * (visible / kKeyBlock + segments_[s].run_count);
      if (keys > w_.retained_keys) break;
    }
    return s - first;
  }

  void run_group(int64_t first, int64_t count, const float* delta) {
    sweep_means(first, count);
    shifts_from_delta(problem_, rows_, first, count, delta, w_);
    sweep_gradients(first, count);
  }

  // One segment of all keys, whose mean is delta.
  void sweep_plain(const float* delta) {
    const int64_t at = segments_[0].slot * lanes_;
    for (int64_t r = 0; r < lanes_; ++r) w_.products_mean[at + r] = delta[r];
    fill(w_.correction + at, lanes_, 1.0f);
    fill(w_.shift + at, lanes_, 0.0f);
    if (wants_sinks_) finish_sinks();
    KeyBlocks blocks(rows_, segments_, 1);
    for (KeyBlock block; blocks.next(&block);) {
      const Matrices m = in_scratch();
      compute_probabilities(block, m);
      if (wants_logits_) compute_products(block, m.products);
      add_gradients(block, m);
    }
  }

  // Sets w.products_mean and w.correction. The saved log-sum-exps are rounded, which shifts all
  // probabilities of a row alike; dividing by their sum takes that out.
  void sweep_means(int64_t first, int64_t count) {
    kept_ = 0;
    KeyBlocks blocks(rows_, segments_ + first, count);
    for (KeyBlock block; blocks.next(&block);) {
      const Matrices m = place(block);
      compute_probabilities(block, m);
      if (wants_products_) compute_products(block, m.products);
      for (int i = 0; i < block.piece_count; ++i) add_means(block.pieces[i], m);
    }
  }

  // Adds to the gradients of query (w.segment_sum), key and value.
  void sweep_gradients(int64_t first, int64_t count) {
    kept_ = 0;
    KeyBlocks blocks(rows_, segments_ + first, count);
    for (KeyBlock block; blocks.next(&block);) {
      const Matrices m = place(block);
      if (!m.retained) {
        compute_probabilities(block, m);
        if (wants_logits_) compute_products(block, m.products);
      }
      add_gradients(block, m);
    }
  }

  // Where the probabilities and products of a block are, and the slopes of a soft cap: kept for the
  // second sweep while they fit, in scratch otherwise.
  struct Matrices {
    float* probabilities;
    float* products;
    float* slopes;  // null without a soft cap
    bool retained;
  };

  Matrices in_scratch() const { return {w_.logits, w_.products, w_.slopes, false}; }

  Matrices place(const KeyBlock& block) {
    if (w_.retained == nullptr || kept_ + block.padded > w_.retained_keys) return in_scratch();
    const bool capped = w_.slopes != nullptr;
    const int64_t size = block.padded * lanes_;
    float* base = w_.retained + (capped ? 3 : 2) * kept_ * lanes_;
    kept_ += block.padded;
    return {base, base + size, capped ? base + 2 * size : nullptr, true};
  }

  void compute_probabilities(const KeyBlock& block, const Matrices& m) {
    float* p = m.probabilities;
    compute_logits<Products>(problem_, rows_, block, w_, p, wants_logits_ ? m.slopes : nullptr);
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      for (int64_t v = 0; v < lanes_; v += kWidth) {
        Vec lse = load(w_.lse + piece.slot * lanes_ + v);
        lse = lse == splat(-kInfinity) ? splat(kInfinity) : lse;
        for (int key = piece.begin; key < piece.end; ++key) {
          store(p + key * lanes_ + v, exp(load(p + key * lanes_ + v) - lse));
        }
      }
    }
  }

  void compute_products(const KeyBlock& block, float* products) {
    Products::dot(KeySource::values(problem_), rows_, block, w_.grad_columns, 1.0f, w_, products);
  }

  // Adds a piece to the sums of p and of p g of its segment, and divides them after the last.
  void add_means(const Piece& piece, const Matrices& m) {
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      const int64_t at = piece.slot * lanes_ + v;
      // Summed by themselves and then added, as in gemm.h.
      Vec sum{}, mean{};
      for (int key = piece.begin; key < piece.end; ++key) {
        const Vec p = load(m.probabilities + key * lanes_ + v);
        sum += p;
        if (wants_products_) mean += p * load(m.products + key * lanes_ + v);
      }
      sum += load(w_.correction + at);
      mean += load(w_.products_mean + at);
      const Vec inverse = piece.closes ? inverse_or_zero(sum) : sum;
      store(w_.correction + at, inverse);
      store(w_.products_mean + at, piece.closes ? mean * inverse : mean);
    }
  }

  void add_gradients(const KeyBlock& block, const Matrices& m) {
    const bool to_key = overlaps(block, w_.key_range);
    const bool to_value = overlaps(block, w_.value_range);
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      for (int64_t v = 0; v < lanes_; v += kWidth) {
        const int64_t at = piece.slot * lanes_ + v;
        const Vec f = load(w_.factor + at) * load(w_.correction + at);
        const Vec shift = load(w_.shift + at) * load(w_.correction + at);
        const Vec mean = load(w_.products_mean + at);
        for (int key = piece.begin; key < piece.end; ++key) {
          float* p = m.probabilities + key * lanes_ + v;
          float* g = m.products + key * lanes_ + v;
          if (wants_logits_) store(g, load(p) * (f * (load(g) - mean) + shift));
          if (to_value) store(p, load(p) * f);
        }
      }
    }
    if (wants_logits_ && m.slopes != nullptr) multiply_by_slopes(block, m);
    if (wants_query_) {
      Products::add(KeySource::keys(problem_), rows_, block, m.products, w_, w_.segment_sum, true);
    }
    if (to_key) add_key_rows(block, m.products, w_.query_rows, w_.key_range, w_.key_grad);
    if (to_value) add_key_rows(block, m.probabilities, w_.grad_rows, w_.value_range, w_.value_grad);
  }

  // From the gradients of capped logits to those of the products of query and key.
  void multiply_by_slopes(const KeyBlock& block, const Matrices& m) const {
    for (int64_t i = 0; i < block.count * lanes_; i += kWidth) {
      store(m.products + i, load(m.products + i) * load(m.slopes + i));
    }
  }

  // Place of a key in a range: positions count on over the batch elements of the group.
  int64_t place_in(const KeyRange& range, const KeyBlock& block, int32_t position) const {
    const int64_t batch = block.batch == kEveryBatch ? 0 : block.batch - group_.first_batch;
    return position + batch * problem_.local_length - range.first;
  }

  bool overlaps(const KeyBlock& block, const KeyRange& range) const {
    return !is_empty(range) && place_in(range, block, block.highest) >= 0 &&
           place_in(range, block, block.lowest) < range.size();
  }

  void add_key_rows(const KeyBlock& block, const float* coefficients, const float* by_row,
                    const KeyRange& range, float* sums) {
    Products::outer(rows_, block, coefficients, by_row, dim_, w_, w_.key_block);
    for (int i = 0; i < block.count; ++i) {
      const int64_t place = place_in(range, block, block.position[i]);
      if (place < 0 || place >= range.size()) continue;
      float* sum = sums + place * dim_;
      const float* grad = w_.key_block + i * dim_;
      for (int64_t d = 0; d < dim_; ++d) sum[d] += grad[d];
    }
  }

  const Problem& problem_;
  const RowBlock& rows_;
  const RowGroup& group_;
  Workspace& w_;
  const Segment* segments_;
  const int64_t segment_count_;
  const int64_t dim_;
  const int64_t lanes_;
  const bool wants_query_;
  const bool wants_sinks_;
  const bool wants_logits_;    // logit gradients: for query or key
  const bool wants_products_;  // dO.v: for all but the value's gradient
  int64_t kept_ = 0;  // keys placed in w.retained so far
};

// dO.o of every lane.
void compute_delta(const Problem& problem, const RowBlock& rows, const Operand& output,
                   const Operand& grad_output, Workspace& w, float* delta) {
  const int64_t dim = padded_head_dim(problem);
  float *out = w.key_block, *grad = w.key_block + dim;
  fill(delta, rows.lanes, 0.0f);
  for (int r = 0; r < rows.count; ++r) {
    load_row(problem.dtype, row_of(rows, r, output, problem.dtype), output.strides[3],
             problem.head_dim, dim, out);
    load_row(problem.dtype, row_of(rows, r, grad_output, problem.dtype), grad_output.strides[3],
             problem.head_dim, dim, grad);
    Vec sum{};
    for (int64_t d = 0; d < dim; d += kWidth) sum += load(out + d) * load(grad + d);
    delta[r] = sum_of(sum);
  }
}

template <typename Products>
void backward(const Problem& problem, const RowBlock& rows, const float* state,
              const Operand& output, const Operand& grad_output, const Operand& grad_query,
              float* score_sums, float* sink_gradients, Workspace& w) {
  const bool scored = rows.kind == RowKind::kScored;
  Products::load_columns(problem, rows, problem.query, w, w.query_columns);
  Products::load_columns(problem, rows, grad_output, w, w.grad_columns);
  if (!is_empty(w.key_range)) Products::load_rows(problem, rows, problem.query, w.query_rows);
  if (!is_empty(w.value_range)) Products::load_rows(problem, rows, grad_output, w.grad_rows);
  load_slots(problem, rows, state, problem.documents + 1, w.lse);
  if (scored) load_scores(problem, rows, w);
  compute_factors(problem, rows, w, w.shift);

  const bool wants_query = grad_query.data != nullptr;
  const bool wants_scores = scored && score_sums != nullptr;
  const bool wants_sinks = sink_gradients != nullptr;
  Backward<Products> pass(problem, rows, wants_query, wants_scores, wants_sinks, w);
  if (!pass.needs_second_sweep() || pass.fits()) {
    pass.run();
  } else {
    float delta[kMaxLanes];
    compute_delta(problem, rows, output, grad_output, w, delta);
    pass.run_in_groups(delta);
  }
  if (wants_scores) sum_scores(problem, rows, w.scores, score_sums);
  for (int r = 0; wants_sinks && r < rows.count; ++r) {
    sink_gradients[state_index(problem, rows, r)] = w.sinks[r];
  }
  if (wants_query) store_rows(problem, rows, w.segment_sum, problem.scale, w, grad_query);
}

}  // namespace
}  // namespace dream::cpu
