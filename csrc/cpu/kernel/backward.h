// Backward of one row block: a sweep that finds dO.o of every segment, from which all coefficients
// and the scores' gradient follow, and a second one for the gradients of query, key and value.
//
// With f the factors, p the probabilities inside the segment, g = dO.v and mean_s = dO.o_s, the
// gradient of a logit is p (f_s (g - mean_s) + t_s), as derived in dream_kernels/reference.py.
#pragma once

#include "score_gradient.h"

namespace dream::cpu {
namespace {

DREAM_INLINE bool is_empty(const KeyRange& range) { return range.first == range.last; }

// One backward row block; w.lse and the row block's queries and gradients are in scratch.
template <typename Products>
class Backward {
 public:
  Backward(const Problem& problem, const RowBlock& rows, bool wants_query, bool wants_scores,
           Workspace& workspace)
      : problem_(problem),
        rows_(rows),
        group_(*rows.group),
        w_(workspace),
        segments_(rows.kind == RowKind::kScored ? group_.segments : &group_.all),
        segment_count_(rows.kind == RowKind::kScored ? group_.segment_count : 1),
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
    fill(w_.products_mean, (problem_.documents + 1) * lanes_, 0.0f);
    fill(w_.correction, (problem_.documents + 1) * lanes_, 0.0f);
    KeyBlocks blocks(rows_, segments_, segment_count_ - documents_only);
    for (KeyBlock block; blocks.next(&block);) {
      const Matrices m = place(block);
      compute_probabilities(block, m.probabilities);
      if (wants_products_) compute_products(block, m.products);
      for (int i = 0; i < block.piece_count; ++i) add_means(block.pieces[i], m);
    }
  }

  // Adds to the gradients of query (w.segment_sum), key and value.
  void sweep_gradients() {
    fill(w_.segment_sum, dim_ * lanes_, 0.0f);
    kept_ = 0;
    for (int64_t s = 0; s < segment_count_; ++s) {
      const int64_t at = segments_[s].slot * lanes_;
      scale_columns(w_.factor + at, 1, lanes_, w_.correction + at);
      scale_columns(w_.shift + at, 1, lanes_, w_.correction + at);
    }
    KeyBlocks blocks(rows_, segments_, segment_count_);
    for (KeyBlock block; blocks.next(&block);) {
      const Matrices m = place(block);
      if (!m.retained) {
        compute_probabilities(block, m.probabilities);
        if (wants_logits_) compute_products(block, m.products);
      }
      add_gradients(block, m);
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

  void compute_probabilities(const KeyBlock& block, float* p) {
    compute_logits<Products>(problem_, rows_, block, w_, p);
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
      Vec sum = load(w_.correction + at), mean = load(w_.products_mean + at);
      for (int key = piece.begin; key < piece.end; ++key) {
        const Vec p = load(m.probabilities + key * lanes_ + v);
        sum += p;
        if (wants_products_) mean += p * load(m.products + key * lanes_ + v);
      }
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
        const Vec f = load(w_.factor + piece.slot * lanes_ + v);
        const Vec mean = load(w_.products_mean + piece.slot * lanes_ + v);
        const Vec shift = load(w_.shift + piece.slot * lanes_ + v);
        for (int key = piece.begin; key < piece.end; ++key) {
          float* p = m.probabilities + key * lanes_ + v;
          float* g = m.products + key * lanes_ + v;
          if (wants_logits_) store(g, load(p) * (f * (load(g) - mean) + shift));
          if (to_value) store(p, load(p) * f);
        }
      }
    }
    if (wants_query_) {
      Products::add(KeySource::keys(problem_), rows_, block, m.products, w_, w_.segment_sum, true);
    }
    if (to_key) add_key_rows(block, m.products, w_.query_rows, w_.key_range, w_.key_grad);
    if (to_value) add_key_rows(block, m.probabilities, w_.grad_rows, w_.value_range, w_.value_grad);
  }

  // Place of a key in a range: positions count on over the batch elements of the group.
  int64_t place_in(const KeyRange& range, const KeyBlock& block, int i) const {
    const int64_t batch = block.batch == kEveryBatch ? 0 : block.batch - group_.first_batch;
    return block.position[i] + batch * problem_.local_length - range.first;
  }

  bool overlaps(const KeyBlock& block, const KeyRange& range) const {
    return !is_empty(range) && place_in(range, block, block.count - 1) >= 0 &&
           block.position[0] < range.last;
  }

  void add_key_rows(const KeyBlock& block, const float* coefficients, const float* by_row,
                    const KeyRange& range, float* sums) {
    Products::outer(rows_, block, coefficients, by_row, dim_, w_, w_.key_block);
    for (int i = 0; i < block.count; ++i) {
      const int64_t place = place_in(range, block, i);
      if (place < 0 || place >= range.last - range.first) continue;
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
  const bool wants_logits_;    // logit gradients: for query or key
  const bool wants_products_;  // dO.v: for all but the value's gradient
  int64_t kept_ = 0;  // keys placed in w.retained so far
};

template <typename Products>
void backward(const Problem& problem, const RowBlock& rows, const float* state,
              const Operand& grad_output, const Operand& grad_query, float* score_sums,
              Workspace& w) {
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
  Backward<Products> pass(problem, rows, wants_query, wants_scores, w);
  pass.sweep_means();
  compute_shifts(problem, rows, w);
  if (wants_scores) sum_scores(problem, rows, w.scores, score_sums);
  if (!pass.needs_second_sweep()) return;
  pass.sweep_gradients();
  if (wants_query) store_rows(problem, rows, w.segment_sum, problem.scale, w, grad_query);
}

}  // namespace
}  // namespace dream::cpu
