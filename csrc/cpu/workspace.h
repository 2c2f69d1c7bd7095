// Scratch memory of one thread.
#pragma once

#include <cstdint>
#include <optional>

#include "../problem.h"
#include "buffer.h"
#include "layout.h"

namespace dream::cpu {

// Keys are taken in blocks of at most this many, padded to a multiple of kKeyUnit.
constexpr int kKeyBlock = 64;
constexpr int kKeyUnit = 8;

// Keys whose gradient is summed: empty, the prefix, the local keys, or both. Local keys of the batch
// elements of a row group follow each other.
struct KeyRange {
  int64_t first;
  int64_t last;

  int64_t size() const { return last - first; }
};

// Matrices are row-major float32; "lanes" are the rows of the block (up to kMaxLanes), and lie
// next to each other, so that everything that happens per row happens in vectors. Dp is D rounded
// up to kLaneUnit, the padding being zero. Columns and rows of queries and gradients, and the key
// block, hold pairs of bfloat16 instead where the products are taken of those.
struct Workspace {
  // Queries and output gradients of the row block, as columns and as rows.
  float* query_columns;  // [Dp, lanes]
  float* query_rows;     // [kMaxLanes, Dp]
  float* grad_columns;   // [Dp, lanes]
  float* grad_rows;      // [kMaxLanes, Dp]

  // The key block at hand.
  float* key_block;  // [kKeyBlock, Dp], keys or values, or their gradient
  float* logits;     // [kKeyBlock, lanes], then probabilities
  float* products;   // [kKeyBlock, lanes], dO.v, then logit gradients
  float* slopes;     // [kKeyBlock, lanes], derivatives of the soft cap; null without one
  float* pairs;      // [kKeyBlock, lanes / 2], one of the two in bfloat16
  float* share;      // [kKeyBlock, lanes], of each document in a block of several
  float* total;      // [kKeyBlock, lanes], its sum of exp(logit - peak)

  // Sums over the keys.
  float* segment_sum;    // [Dp, lanes], output of one segment, or the query's gradient
  float* documents_sum;  // [Dp, lanes], weighted output of the documents

  // Per segment and lane: [C + 1, lanes].
  float* lse;
  float* scores;         // relative to the largest, or the weights; then the gradient in them
  float* products_mean;  // dO.o_s
  float* correction;     // 1 / sum of the probabilities, which is nearly 1
  float* factor;         // f_s: o = sum of f_s o_s
  float* shift;          // gradient in the segment's log-sum-exp

  float* sinks;  // [lanes], the rows' sinks and then the gradient in them; null without sinks

  // Probabilities, dO.v and, with a soft cap, its derivatives of the first keys of a backward row
  // block, kept for its second sweep.
  float* retained;
  int64_t retained_keys;

  // Gradients of the keys of one key head, [size, Dp]; the memory is that of KeyGradients.
  float* key_grad;
  float* value_grad;
  KeyRange key_range;
  KeyRange value_range;
};

// Owns the memory of a Workspace; members that the pass does not use stay null.
class WorkspaceMemory {
 public:
  static WorkspaceMemory for_forward(const Problem& problem);
  static WorkspaceMemory for_scores(const Problem& problem);
  static WorkspaceMemory for_mass(const Problem& problem);
  static WorkspaceMemory for_backward(const Problem& problem, const Gradients& gradients);

  Workspace& get() { return workspace_; }

 private:
  template <typename Plan>
  explicit WorkspaceMemory(const Plan& plan);

  std::optional<Buffer> memory_;
  Workspace workspace_{};
};

}  // namespace dream::cpu
