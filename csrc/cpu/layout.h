// Where keys are, and which rows are computed together.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"

namespace dream::cpu {

// A row block holds at most this many rows; scratch is laid out in multiples of kLaneUnit rows.
constexpr int kMaxLanes = 48;
constexpr int kLaneUnit = 16;

// Row blocks over several batch elements together pass over at most this many local keys.
constexpr int64_t kMergedLocalKeys = 512;

// Run::batch of keys in a prefix that the rows of several batch elements see.
constexpr int64_t kEveryBatch = -1;

// Neighbouring key positions [begin, end) without padding, as batch element `batch` sees them. The
// positions from which a window counts do not descend within a run.
struct Run {
  int64_t begin;
  int64_t end;
  int64_t batch;
};

// Keys that share a softmax: one document, everything outside the documents, or all keys.
// `slot` is the segment's place in the saved state: the document, or C.
struct Segment {
  const Run* runs;
  int64_t run_count;
  int64_t slot;
};

// The batch elements [first_batch, first_batch + batches) whose rows may share a row block,
// and their keys. More than one only where they share a prefix and everything about it.
struct RowGroup {
  int64_t first_batch;
  int64_t batches;
  const Segment* segments;  // the present documents in the order of the scores, then the rest
  int64_t segment_count;
  Segment all;              // every key that is not padding, for plain rows
  int64_t first_scored;     // rows from here on are scored in the heads that receive scores

  // Set where a window counts from given positions. In 32 bits, as Layout made them.
  const int32_t* window_positions;  // [batches, T], of the keys
  const int32_t* reach;             // [batches, M], the lowest that a row sees

  // A key's position for a window.
  int32_t window_position(int64_t position, int64_t batch, int64_t length) const {
    if (window_positions == nullptr) return static_cast<int32_t>(position);
    const int64_t element = batch == kEveryBatch ? 0 : batch - first_batch;
    return window_positions[element * length + position];
  }
};

enum class RowKind : int32_t {
  kScored,  // segments with scores
  kPlain,   // one segment of all keys
  kAll      // every row, by segments, without scores: for the masses
};

// Up to kMaxLanes rows that share their keys: rows of all query heads over one key head.
struct RowBlock {
  const RowGroup* group;
  int64_t key_head;
  RowKind kind;
  int count;
  int lanes;                    // count rounded up to kLaneUnit
  int32_t batch[kMaxLanes];     // of each row, as are the following
  int32_t head[kMaxLanes];      // query head
  int32_t row[kMaxLanes];
  int32_t limit[kMaxLanes];     // last visible key position; -1 or less: none
  int32_t target[kMaxLanes];    // kScored only: which of the scores' sums a row adds to
  int targets;
  int64_t number;               // kScored only: of the block among all scored ones
  int32_t min_limit;
  int32_t max_limit;
  int64_t length;               // T
  bool windowed;                // whether the following are set
  int32_t reach[kMaxLanes];     // lowest window position that a row sees
  int32_t min_reach;
  int32_t max_reach;

  // Scored rows see their documents whatever the window; everything else is subject to it.
  bool windows(const Segment& segment) const {
    return windowed && (kind == RowKind::kAll || segment.slot == group->all.slot);
  }
};

// Where a row block starts in the rows of its kind; small enough to list all of them.
struct RowBlockIndex {
  int64_t group;
  int64_t key_head;
  RowKind kind;
  int64_t first;
};

class Layout {
 public:
  // Throws std::invalid_argument for spans that are out of range or overlap.
  explicit Layout(const Problem& problem);

  int64_t group_count() const { return static_cast<int64_t>(groups_.size()); }
  const RowGroup& group(int64_t g) const { return groups_[g]; }

  // The row blocks of one group and key head, appended in a fixed order.
  void append_row_blocks(int64_t group, int64_t key_head, RowKind kind,
                         std::vector<RowBlockIndex>* blocks) const;

  void fill(const RowBlockIndex& index, RowBlock* block) const;

  // The scored row blocks over a key head have the numbers [first_number, end_number).
  int64_t first_number(int64_t group, int64_t key_head) const {
    return first_numbers_[group * problem_.key_heads + key_head];
  }
  int64_t end_number(int64_t group, int64_t key_head) const {
    return first_numbers_[group * problem_.key_heads + key_head + 1];
  }
  int64_t scored_block_count() const { return first_numbers_.back(); }

  // Scores of its own that a batch element has in the rows over a key head: one where all heads
  // share them, otherwise one for each head that receives any.
  int64_t score_heads(int64_t key_head) const {
    return problem_.scores.shape[1] == 1 ? 1 : scored_heads_[key_head];
  }
  // The head that the i-th of these is for, as an index into the scores.
  int64_t score_head(int64_t key_head, int64_t i) const {
    if (problem_.scores.shape[1] == 1) return 0;
    return heads_[key_head * (problem_.query_heads / problem_.key_heads) + i];
  }

 private:
  int64_t merged_batches() const;
  bool share_keys() const;
  void add_group(int64_t first_batch, int64_t batches);
  void add_window_positions(RowGroup* group);
  int32_t reach_of(const RowGroup& group, int64_t batch, int64_t row) const;
  int64_t row_count(const RowGroup& group, int64_t key_head, RowKind kind) const;

  const Problem& problem_;
  // Query heads of each key head, those that receive scores first.
  std::vector<int32_t> heads_;
  std::vector<int64_t> scored_heads_;  // per key head, how many receive scores
  std::vector<std::vector<Run>> runs_;
  std::vector<std::vector<Segment>> segments_;
  std::vector<std::vector<int32_t>> window_positions_;
  std::vector<RowGroup> groups_;
  std::vector<int64_t> first_numbers_;  // by group and key head, and the number of all
};

}  // namespace dream::cpu
