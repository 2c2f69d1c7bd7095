// The scores' gradient: sums of the row blocks, added in the order of the blocks' numbers.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "buffer.h"
#include "layout.h"

namespace dream::cpu {

class ScoreSums {
 public:
  // Without `wanted` there are no sums, and their address is null.
  ScoreSums(const Problem& problem, const Layout& layout, bool wanted);

  // Where a row block writes its [targets, C].
  float* of(const RowBlock& rows) const {
    return rows.kind == RowKind::kScored && size_ > 0 ? sums_.data() + rows.number * size_ : nullptr;
  }

  // Adds the blocks' sums into the gradient [B, 1 or Hq, C]; heads without scores get 0.
  void finish(const Operand& gradient) const;

 private:
  const Problem& problem_;
  const Layout& layout_;
  int64_t size_;  // of one block
  Buffer sums_;
};

}  // namespace dream::cpu
