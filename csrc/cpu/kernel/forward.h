// Forward of one row block: one sweep over the keys, segment by segment.
#pragma once

#include "segments.h"

namespace dream::cpu {
namespace {

// Running softmax of a row block; per lane the largest logit and the sum of exp(logit - largest).
struct Softmax {
  float peak[kMaxLanes];
  float total[kMaxLanes];
};

// Starts with one entry of the given log-sum-exp, a sink, or with none where it is -inf.
DREAM_INLINE void open_softmax(const float* lse, int64_t lanes, Softmax* softmax) {
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const Vec peak = load(lse + v);
    store(softmax->peak + v, peak);
    store(softmax->total + v, peak == splat(-kInfinity) ? Vec{} : splat(1.0f));
  }
}

// A lane that has seen nothing yet must not compute inf - inf.
DREAM_INLINE Vec finite_or_zero(Vec peak) { return peak == splat(-kInfinity) ? Vec{} : peak; }

// Takes in the logits of one piece, turns them into exp(logit - peak), and gives the factor by
// which everything summed so far shrinks. Returns whether any lane does.
bool update_softmax(const Piece& piece, int64_t lanes, float* logits, Softmax* softmax,
                    float* shrink) {
  bool any = false;
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const Vec old_peak = load(softmax->peak + v);
    Vec peak = old_peak;
    for (int i = piece.begin; i < piece.end; ++i) peak = max(load(logits + i * lanes + v), peak);
    const Vec reference = finite_or_zero(peak);
    const Vec factor = exp(old_peak - reference);
    Vec total{};
    for (int i = piece.begin; i < piece.end; ++i) {
      const Vec p = exp(load(logits + i * lanes + v) - reference);
      total += p;
      store(logits + i * lanes + v, p);
    }
    store(softmax->peak + v, peak);
    store(softmax->total + v, load(softmax->total + v) * factor + total);
    store(shrink + v, factor);
    for (int lane = 0; lane < kWidth; ++lane) any |= !(shrink[v + lane] == 1.0f);
  }
  return any;
}

// The softmax of a piece that is a whole segment.
void softmax_of_whole(const Piece& piece, int64_t lanes, float* logits, Softmax* softmax) {
  for (int64_t v = 0; v < lanes; v += kWidth) {
    Vec peak = splat(-kInfinity);
    for (int i = piece.begin; i < piece.end; ++i) peak = max(load(logits + i * lanes + v), peak);
    const Vec reference = finite_or_zero(peak);
    Vec total{};
    for (int i = piece.begin; i < piece.end; ++i) {
      const Vec p = exp(load(logits + i * lanes + v) - reference);
      total += p;
      store(logits + i * lanes + v, p);
    }
    store(softmax->peak + v, peak);
    store(softmax->total + v, total);
  }
}

// Log-sum-exp of a segment's logits, -inf where no key is visible.
void finish_softmax(const Softmax& softmax, int64_t lanes, float* lse) {
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const Vec total = load(softmax.total + v);
    const Vec sum = load(softmax.peak + v) + log(total == Vec{} ? splat(1.0f) : total);
    store(lse + v, total == Vec{} ? splat(-kInfinity) : sum);
  }
}

template <typename Products>
class Forward {
 public:
  Forward(const Problem& problem, const RowBlock& rows, void* segment_outputs,
          Workspace& workspace)
      : problem_(problem),
        rows_(rows),
        segment_outputs_(segment_outputs),
        w_(workspace),
        dim_(padded_head_dim(problem)),
        lanes_(rows.lanes),
        reweight_(problem.mode == Mode::kReweight) {}

  void run(const Operand& output, float* state) {
    Products::load_columns(problem_, rows_, problem_.query, w_, w_.query_columns);
    start_lse(problem_, rows_, w_);
    const bool scored = rows_.kind == RowKind::kScored;
    const RowGroup& group = *rows_.group;
    if (segment_outputs_ != nullptr) clear_outputs();
    if (scored) {
      load_scores(problem_, rows_, w_);
      attend_documents();
    }
    attend_rest(scored ? group.segments[group.segment_count - 1] : group.all);
    store_slots(problem_, rows_, w_.lse, problem_.documents + 1, state);
    compute_factors(problem_, rows_, w_, w_.factor);
    join(scored);
    store_rows(problem_, rows_, w_.segment_sum, 1.0f, w_, output);
  }

 private:
  // Leaves the mean over the documents in w.documents_sum, with weights w (reweight) or
  // exp(score + lse - peak) (bias), whose sum is documents_.total.
  void attend_documents() {
    fill(w_.documents_sum, dim_ * lanes_, 0.0f);
    fill(documents_.peak, lanes_, -kInfinity);
    fill(documents_.total, lanes_, reweight_ ? 1.0f : 0.0f);
    Softmax softmax;
    KeyBlocks blocks(rows_, rows_.group->segments, rows_.group->segment_count - 1,
                     segment_outputs_ == nullptr);
    for (KeyBlock block; blocks.next(&block);) {
      compute_logits<Products>(problem_, rows_, block, w_, w_.logits);
      if (block.whole) {
        weigh_documents(block);
        add_values(block, w_.documents_sum, true);
      } else {
        attend_part(block, &softmax);
        if (block.pieces[0].closes) {
          keep_output(block.pieces[0].slot, softmax);
          merge_document(block.pieces[0].slot, softmax);
        }
      }
    }
  }

  // Takes a part of a segment into w.segment_sum, the sum of exp(logit - peak) v.
  void attend_part(const KeyBlock& block, Softmax* softmax) {
    const Piece& piece = block.pieces[0];
    if (piece.opens) open_softmax(w_.lse + piece.slot * lanes_, lanes_, softmax);
    float shrink[kMaxLanes];
    const bool shrinks = update_softmax(piece, lanes_, w_.logits, softmax, shrink);
    if (shrinks && !piece.opens) scale_columns(w_.segment_sum, dim_, lanes_, shrink);
    add_values(block, w_.segment_sum, !piece.opens);
    if (piece.closes) finish_softmax(*softmax, lanes_, w_.lse + piece.slot * lanes_);
  }

  void add_values(const KeyBlock& block, float* sums, bool accumulate) {
    Products::add(KeySource::values(problem_), rows_, block, w_.logits, w_, sums, accumulate);
  }

  // Turns the logits of whole documents into their keys' shares of w.documents_sum.
  void weigh_documents(const KeyBlock& block) {
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      const int64_t at = piece.slot * lanes_;
      Softmax softmax;
      softmax_of_whole(piece, lanes_, w_.logits, &softmax);
      finish_softmax(softmax, lanes_, w_.lse + at);
      float* share = w_.share + i * lanes_;
      for (int64_t v = 0; v < lanes_; v += kWidth) {
        if (reweight_) {
          // Every document of the block is seen by all rows, so no total is 0.
          store(share + v, load(w_.scores + at + v) / load(softmax.total + v));
        } else {
          store(share + v, load(w_.scores + at + v) + load(softmax.peak + v));
          store(w_.total + i * lanes_ + v, load(softmax.total + v));
        }
      }
    }
    if (!reweight_) shares_of_bias(block);
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      for (int64_t v = 0; v < lanes_; v += kWidth) {
        const Vec share = load(w_.share + i * lanes_ + v);
        for (int key = piece.begin; key < piece.end; ++key) {
          float* x = w_.logits + key * lanes_ + v;
          store(x, load(x) * share);
        }
      }
    }
  }

  // w.share goes from score + peak of each document to exp of it, less the peak over all documents
  // so far.
  void shares_of_bias(const KeyBlock& block) {
    float shrink[kMaxLanes];
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      const Vec old_peak = load(documents_.peak + v);
      Vec peak = old_peak;
      for (int i = 0; i < block.piece_count; ++i) peak = max(load(w_.share + i * lanes_ + v), peak);
      const Vec reference = finite_or_zero(peak);
      const Vec kept = exp(old_peak - reference);
      Vec total = load(documents_.total + v) * kept;
      for (int i = 0; i < block.piece_count; ++i) {
        const Vec share = exp(load(w_.share + i * lanes_ + v) - reference);
        total += share * load(w_.total + i * lanes_ + v);
        store(w_.share + i * lanes_ + v, share);
      }
      store(documents_.peak + v, peak);
      store(documents_.total + v, total);
      store(shrink + v, kept);
    }
    scale_columns(w_.documents_sum, dim_, lanes_, shrink);
  }

  // Adds the document that w.segment_sum holds to w.documents_sum.
  void merge_document(int64_t slot, const Softmax& softmax) {
    float keep[kMaxLanes], add[kMaxLanes];
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      const Vec score = load(w_.scores + slot * lanes_ + v);
      const Vec total = load(softmax.total + v);
      if (reweight_) {
        store(keep + v, splat(1.0f));
        store(add + v, score / total);
        continue;
      }
      const Vec exponent = score + load(softmax.peak + v);
      const Vec old_peak = load(documents_.peak + v);
      const Vec peak = max(exponent, old_peak);
      const Vec reference = finite_or_zero(peak);
      const Vec kept = exp(old_peak - reference), added = exp(exponent - reference);
      store(documents_.peak + v, peak);
      store(documents_.total + v, load(documents_.total + v) * kept + added * total);
      store(keep + v, kept);
      store(add + v, added);
    }
    for (int64_t d = 0; d < dim_; ++d) {
      for (int64_t v = 0; v < lanes_; v += kWidth) {
        float* sum = w_.documents_sum + d * lanes_ + v;
        const Vec added = load(w_.segment_sum + d * lanes_ + v) * load(add + v);
        store(sum, load(sum) * load(keep + v) + added);
      }
    }
  }

  // Leaves the rest, or all keys of plain rows, in w.segment_sum and rest_.
  void attend_rest(const Segment& segment) {
    fill(rest_.total, lanes_, 0.0f);
    bool any = false;
    KeyBlocks blocks(rows_, &segment, 1);
    for (KeyBlock block; blocks.next(&block); any = true) {
      compute_logits<Products>(problem_, rows_, block, w_, w_.logits);
      attend_part(block, &rest_);
    }
    if (!any) fill(w_.segment_sum, dim_ * lanes_, 0.0f);
    keep_output(problem_.documents, rest_);
  }

  // Zeros where no segment will be kept, so that nothing is left unwritten.
  void clear_outputs() {
    const bool scored = rows_.kind == RowKind::kScored;
    if (scored && rows_.group->segment_count == problem_.documents + 1) return;
    const int64_t bytes =
        (problem_.documents + 1) * problem_.head_dim * element_size(problem_.dtype);
    for (int r = 0; r < rows_.count; ++r) {
      __builtin_memset(segment_output(problem_, rows_, r, 0, segment_outputs_), 0, bytes);
    }
  }

  // Writes the segment that w.segment_sum holds to the kept outputs, if any are kept.
  void keep_output(int64_t slot, const Softmax& softmax) {
    if (segment_outputs_ == nullptr || rows_.kind != RowKind::kScored) return;
    float inverse[kMaxLanes];
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      store(inverse + v, inverse_or_zero(load(softmax.total + v)));
    }
    lanes_to_rows(w_.segment_sum, lanes_, rows_.count, dim_,
                  [&](int r) { return w_.key_block + r * dim_; });
    for (int r = 0; r < rows_.count; ++r) {
      store_row(problem_.dtype, w_.key_block + r * dim_, inverse[r],
                segment_output(problem_, rows_, r, slot, segment_outputs_), 1, problem_.head_dim);
    }
  }

  // Turns w.segment_sum into the output.
  void join(bool scored) {
    const RowGroup& group = *rows_.group;
    const int64_t rest = problem_.documents * lanes_;
    for (int64_t v = 0; v < lanes_; v += kWidth) {
      const Vec rest_factor = load(w_.factor + rest + v) * inverse_or_zero(load(rest_.total + v));
      Vec documents_factor{};
      if (scored) {
        for (int64_t s = 0; s + 1 < group.segment_count; ++s) {
          documents_factor += load(w_.factor + group.segments[s].slot * lanes_ + v);
        }
        documents_factor *= inverse_or_zero(load(documents_.total + v));
      }
      for (int64_t d = 0; d < dim_; ++d) {
        const int64_t at = d * lanes_ + v;
        Vec x = load(w_.segment_sum + at) * rest_factor;
        if (scored) x += load(w_.documents_sum + at) * documents_factor;
        store(w_.segment_sum + at, x);
      }
    }
  }

  const Problem& problem_;
  const RowBlock& rows_;
  void* const segment_outputs_;  // null where they are not kept
  Workspace& w_;
  const int64_t dim_;
  const int64_t lanes_;
  const bool reweight_;
  Softmax documents_;
  Softmax rest_;
};

template <typename Products>
void mass(const Problem& problem, const RowBlock& rows, float* masses, Workspace& w) {
  const RowGroup& group = *rows.group;
  const int64_t lanes = rows.lanes, slots = problem.documents + 1;
  Products::load_columns(problem, rows, problem.query, w, w.query_columns);
  start_lse(problem, rows, w);
  Softmax softmax;
  float shrink[kMaxLanes];
  KeyBlocks blocks(rows, group.segments, group.segment_count);
  for (KeyBlock block; blocks.next(&block);) {
    compute_logits<Products>(problem, rows, block, w, w.logits);
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      if (piece.opens) open_softmax(w.lse + piece.slot * lanes, lanes, &softmax);
      update_softmax(piece, lanes, w.logits, &softmax, shrink);
      if (piece.closes) finish_softmax(softmax, lanes, w.lse + piece.slot * lanes);
    }
  }
  fill(w.factor, slots * lanes, 0.0f);
  softmax_over_segments(group, group.segment_count, lanes, lanes, w.lse, w.factor);
  store_slots(problem, rows, w.factor, problem.documents, masses);
}

}  // namespace
}  // namespace dream::cpu
