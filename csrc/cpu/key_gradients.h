// Sums of key and value gradients over row blocks, in an order that no thread count changes.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../problem.h"
#include "buffer.h"
#include "kernel/kernel.h"
#include "layout.h"
#include "workspace.h"

namespace dream::cpu {

// A key's gradient is a sum over all row blocks that read it. So the unit of work is a part: row
// blocks over one key head, taken in order by one thread into one buffer. Keys whose row blocks are
// spread over several parts get the sum of their buffers, in the order of the parts.
class KeyGradients {
 public:
  KeyGradients(const Problem& problem, const Layout& layout, const Gradients& gradients,
               const Kernel& kernel, int workers);

  int64_t part_count() const { return sum_count_ * parts_per_sum_; }

  // Gives `body` every row block of the part, with the workspace's sums set.
  template <typename Body>
  void run_part(int64_t part, int worker, Workspace* w, const Body& body) {
    const Part range = get_part(part);
    attach(part, worker, w);
    clear(kAll, w);
    for (int64_t g = range.first_group; g < range.last_group; ++g) {
      if (g > range.first_group) clear(kLocal, w);
      const std::vector<RowBlockIndex> blocks = list_row_blocks(g, range.key_head);
      const auto count = static_cast<int64_t>(blocks.size());
      for (int64_t i = count * range.chunk / range.chunks;
           i < count * (range.chunk + 1) / range.chunks; ++i) {
        RowBlock rows;
        layout_.fill(blocks[i], &rows);
        body(rows);
      }
      if (range.chunks == 1) store_local(g, range.key_head, *w);
    }
    if (parts_per_sum_ == 1) store_prefix(range.first_group, range.key_head, *w);
  }

  // After all parts: what there is left to sum, each by one thread.
  int64_t sum_count() const { return parts_per_sum_ == 1 ? 0 : sum_count_; }
  void finish_sum(int64_t sum);

 private:
  // Row blocks of the groups [first_group, last_group) over a key head; when they are spread over
  // `chunks` parts, the chunk-th share of them.
  struct Part {
    int64_t key_head;
    int64_t first_group;
    int64_t last_group;
    int64_t chunk;
    int64_t chunks;
  };
  enum Which { kAll, kLocal };

  Part get_part(int64_t part) const;
  std::vector<RowBlockIndex> list_row_blocks(int64_t group, int64_t key_head) const;
  void attach(int64_t part, int worker, Workspace* w);
  void clear(Which which, Workspace* w) const;
  void store_local(int64_t group, int64_t key_head, const Workspace& w) const;
  void store_prefix(int64_t group, int64_t key_head, const Workspace& w) const;
  void store(const Operand& target, const float* sums, float factor, int64_t batch,
             int64_t key_head) const;

  const Problem& problem_;
  const Layout& layout_;
  const Gradients& gradients_;
  const Kernel& kernel_;
  int64_t dim_;
  KeyRange key_range_;
  KeyRange value_range_;
  bool one_sum_per_head_;  // over all groups: they share a prefix whose gradient is wanted
  int64_t sum_count_;
  int64_t parts_per_sum_;
  int64_t buffer_size_;
  std::optional<Buffer> buffers_;  // one per worker, or per part when sums cross parts
};

}  // namespace dream::cpu
