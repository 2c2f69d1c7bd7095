// Moving row blocks and key blocks into scratch.
#pragma once

#include "../layout.h"
#include "../workspace.h"
#include "convert.h"
#include "gemm.h"

namespace dream::cpu {
namespace {

DREAM_INLINE int64_t padded_head_dim(const Problem& problem) {
  return (problem.head_dim + kLaneUnit - 1) / kLaneUnit * kLaneUnit;
}

DREAM_INLINE void fill(float* target, int64_t n, float x) {
  for (int64_t i = 0; i < n; ++i) target[i] = x;
}

// Reads the rows of `tensor` [B, Hq, M, D] as they are into `by_row` and times `factor` into
// `by_column`.
void load_rows(const Problem& problem, const RowBlock& rows, const Operand& tensor, float factor,
               float* by_row, float* by_column) {
  const int64_t dim = padded_head_dim(problem);
  for (int r = 0; r < rows.count; ++r) {
    load_row(problem.dtype,
             row_address(tensor, problem.dtype, rows.batch, rows.head[r], rows.row[r]),
             tensor.strides[3], problem.head_dim, dim, by_row + r * dim);
  }
  for (int64_t d = 0; d < dim; ++d) {
    float* column = by_column + d * rows.lanes;
    for (int r = 0; r < rows.count; ++r) column[r] = by_row[r * dim + d] * factor;
    for (int r = rows.count; r < rows.lanes; ++r) column[r] = 0.0f;
  }
}

// Writes the lanes of `by_column` times `factor` to the rows of `tensor`.
void store_rows(const Problem& problem, const RowBlock& rows, const float* by_column, float factor,
                const Operand& tensor) {
  for (int r = 0; r < rows.count; ++r) {
    store_row(problem.dtype, by_column + r, rows.lanes, factor,
              row_address(tensor, problem.dtype, rows.batch, rows.head[r], rows.row[r]),
              tensor.strides[3], problem.head_dim);
  }
}

// Some keys of one segment, not necessarily neighbours.
struct KeyBlock {
  int32_t position[kKeyBlock];
  int count;
  int padded;   // count rounded up to kKeyUnit
  bool masked;  // whether some row does not see some of the keys
};

// Cuts the keys of a segment that any row of the block sees into blocks of nearly equal size.
class KeyBlocks {
 public:
  KeyBlocks(const Segment& segment, const RowBlock& rows) : run_(segment.runs), rows_(rows) {
    const Run* end = segment.runs + segment.run_count;
    for (const Run* run = segment.runs; run != end && run->begin <= rows.max_limit; ++run) {
      left_ += (run->end <= rows.max_limit ? run->end : rows.max_limit + 1) - run->begin;
    }
    blocks_ = (left_ + kKeyBlock - 1) / kKeyBlock;
    if (left_ > 0) position_ = run_->begin;
  }

  bool next(KeyBlock* block) {
    if (left_ == 0) return false;
    block->count = static_cast<int>((left_ + blocks_ - 1) / blocks_);
    block->padded = (block->count + kKeyUnit - 1) / kKeyUnit * kKeyUnit;
    for (int i = 0; i < block->count; ++i) {
      if (position_ == run_->end) position_ = (++run_)->begin;
      block->position[i] = static_cast<int32_t>(position_++);
    }
    block->masked = block->position[block->count - 1] > rows_.min_limit;
    left_ -= block->count;
    --blocks_;
    return true;
  }

 private:
  const Run* run_;
  const RowBlock& rows_;
  int64_t position_ = 0;
  int64_t left_ = 0;
  int64_t blocks_ = 0;
};

// Reads the block's rows of key or value, in two segments of memory, into [padded, Dp].
void load_keys(const Problem& problem, const RowBlock& rows, const KeyBlock& block,
               const Operand& prefix, const Operand& local, float* target) {
  const int64_t dim = padded_head_dim(problem);
  for (int i = 0; i < block.count; ++i) {
    const int64_t position = block.position[i];
    const bool in_prefix = position < problem.prefix_length;
    const Operand& source = in_prefix ? prefix : local;
    load_row(problem.dtype,
             row_address(source, problem.dtype, rows.batch, rows.key_head,
                         in_prefix ? position : position - problem.prefix_length),
             source.strides[3], problem.head_dim, dim, target + i * dim);
  }
  fill(target + block.count * dim, (block.padded - block.count) * dim, 0.0f);
}

// Reads the block's keys and computes its logits [padded, lanes], -inf where a row does not
// see a key.
void compute_logits(const Problem& problem, const RowBlock& rows, const KeyBlock& block,
                    Workspace& w, float* logits) {
  const int64_t dim = padded_head_dim(problem), lanes = rows.lanes;
  load_keys(problem, rows, block, problem.prefix_key, problem.key, w.key);
  multiply<Lies::kByRows>(block.padded, lanes, problem.head_dim, w.key, dim, w.query_columns,
                          lanes, logits, lanes, false);
  if (!block.masked) return;
  for (int i = 0; i < block.count; ++i) {
    if (block.position[i] <= rows.min_limit) continue;
    const VecInt position = VecInt{} + block.position[i];
    for (int64_t v = 0; v < lanes; v += kWidth) {
      float* x = logits + i * lanes + v;
      store(x, position <= load(rows.limit + v) ? load(x) : splat(-kInfinity));
    }
  }
}

}  // namespace
}  // namespace dream::cpu
