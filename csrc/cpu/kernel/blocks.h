// Which keys a row block takes at once.
#pragma once

#include "../layout.h"
#include "../workspace.h"
#include "vector.h"

namespace dream::cpu {
namespace {

DREAM_INLINE int64_t padded_head_dim(const Problem& problem) {
  return (problem.head_dim + kLaneUnit - 1) / kLaneUnit * kLaneUnit;
}

DREAM_INLINE void fill(float* target, int64_t n, float x) {
  for (int64_t i = 0; i < n; ++i) target[i] = x;
}

// The keys [begin, end) of a block, all of one segment.
struct Piece {
  int64_t slot;
  int begin;
  int end;
  bool opens;   // holds the first keys of the segment that the row block sees
  bool closes;  // holds the last
};

// Some keys, not necessarily neighbours: several whole segments, or a part of one.
struct KeyBlock {
  int32_t position[kKeyBlock];
  int32_t window_position[kKeyBlock];  // of windowed row blocks; the highest where all rows see
  int32_t lowest;     // position; documents may come in any order
  int32_t highest;
  bool neighbours;    // whether every position is the one before it plus 1
  int count;
  int padded;         // count rounded up to kKeyUnit
  int64_t batch;      // whose keys they are, as in Run
  bool of_one_batch;  // whether rows of the group's other batch elements do not see them
  bool masked;        // whether some row sees only some of them
  bool whole;
  int piece_count;
  Piece pieces[kKeyBlock];
};

// The first key of a run in [begin, end) that the window of any row of the block reaches.
inline int64_t first_in_reach(const RowBlock& rows, const Run& run, int64_t end) {
  const auto reached = [&](int64_t position) {
    return rows.group->window_position(position, run.batch, rows.length) >= rows.min_reach;
  };
  int64_t begin = run.begin;
  if (begin >= end || reached(begin)) return begin;
  // Positions do not descend within a run.
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (reached(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return end;
}

// The keys of a run of `segment` that any row of the block sees.
DREAM_INLINE KeyRange visible_keys(const RowBlock& rows, const Segment& segment, const Run& run) {
  const int64_t end = run.end <= rows.max_limit ? run.end : rows.max_limit + 1;
  const int64_t begin = rows.windows(segment) ? first_in_reach(rows, run, end) : run.begin;
  return {begin, end > begin ? end : begin};
}

DREAM_INLINE int64_t visible_keys(const RowBlock& rows, const Segment& segment) {
  int64_t keys = 0;
  for (int64_t i = 0; i < segment.run_count; ++i) {
    keys += visible_keys(rows, segment, segment.runs[i]).size();
  }
  return keys;
}

// Cuts the keys of some segments that any row of the block sees into key blocks: short segments
// together, long ones alone and into nearly equal parts.
class KeyBlocks {
 public:
  // Without `packs` no block holds more than one segment.
  KeyBlocks(const RowBlock& rows, const Segment* segments, int64_t count, bool packs = true)
      : rows_(rows), segment_(segments), end_(segments + count), packs_(packs) {
    open_segment();
  }

  bool next(KeyBlock* block) {
    if (segment_ == end_) return false;
    block->count = 0;
    block->piece_count = 0;
    block->batch = run_->batch;
    block->of_one_batch = rows_.group->batches > 1 && block->batch != kEveryBatch;
    block->masked = false;
    block->neighbours = true;
    block->lowest = INT32_MAX;
    block->highest = -1;
    block->whole = is_short();
    if (block->whole) {
      do {
        take(left_, block);
      } while (segment_ != end_ && is_short() && left_ <= kKeyBlock - block->count &&
               run_->batch == block->batch);
    } else {
      const int64_t parts = (left_ + kKeyBlock - 1) / kKeyBlock;
      take((left_ + parts - 1) / parts, block);
    }
    block->padded = (block->count + kKeyUnit - 1) / kKeyUnit * kKeyUnit;
    return true;
  }

 private:
  KeyRange visible(const Run& run) const { return visible_keys(rows_, *segment_, run); }

  const Run* last_run() const { return segment_->runs + segment_->run_count; }

  bool is_short() const { return packs_ && opens_ && left_ <= kKeyBlock && !continues_; }

  // Stands at the first visible key of this segment or of the next that has one.
  void open_segment() {
    opens_ = true;
    for (; segment_ != end_; ++segment_) {
      if (open_stretch(segment_->runs)) return;
    }
  }

  // Stands at the first visible key from `run` on and counts those of its batch element.
  bool open_stretch(const Run* run) {
    while (run != last_run() && visible(*run).size() == 0) ++run;
    if (run == last_run()) return false;
    enter(run);
    left_ = 0;
    continues_ = false;
    for (; run != last_run(); ++run) {
      const int64_t keys = visible(*run).size();
      if (run->batch == run_->batch) {
        left_ += keys;
      } else if (keys > 0) {
        continues_ = true;
      }
    }
    return true;
  }

  void enter(const Run* run) {
    const KeyRange range = visible(*run);
    run_ = run;
    position_ = range.first;
    stop_ = range.last;
  }

  // Moves the next `count` keys, all of one segment and batch element, into the block.
  void take(int64_t count, KeyBlock* block) {
    Piece& piece = block->pieces[block->piece_count++];
    piece.slot = segment_->slot;
    piece.begin = block->count;
    piece.end = block->count + static_cast<int>(count);
    piece.opens = opens_;
    for (int i = piece.begin; i < piece.end; ++i) {
      while (position_ >= stop_) enter(run_ + 1);
      block->position[i] = static_cast<int32_t>(position_++);
    }
    block->count = piece.end;
    if (rows_.windowed) take_window_positions(piece, block);
    // Positions ascend within a piece, and not from one piece to the next.
    const int32_t first = block->position[piece.begin], last = block->position[piece.end - 1];
    const bool follows = piece.begin == 0 || first == block->position[piece.begin - 1] + 1;
    block->neighbours &= follows && last - first == piece.end - 1 - piece.begin;
    block->lowest = first < block->lowest ? first : block->lowest;
    block->highest = last > block->highest ? last : block->highest;
    block->masked |= last > rows_.min_limit;
    opens_ = false;
    left_ -= count;
    piece.closes = left_ == 0 && !continues_;
    if (left_ > 0) return;
    // What is left of this segment are keys of another batch element.
    const Run* run = run_;
    const int64_t batch = run_->batch;
    while (run != last_run() && run->batch == batch) ++run;
    if (!continues_ || !open_stretch(run)) {
      ++segment_;
      open_segment();
    }
  }

  void take_window_positions(const Piece& piece, KeyBlock* block) const {
    const bool windows = rows_.windows(*segment_);
    for (int i = piece.begin; i < piece.end; ++i) {
      block->window_position[i] =
          windows ? rows_.group->window_position(block->position[i], block->batch, rows_.length)
                  : INT32_MAX;
      block->masked |= block->window_position[i] < rows_.max_reach;
    }
  }

  const RowBlock& rows_;
  const Segment* segment_;
  const Segment* end_;
  const bool packs_;
  const Run* run_ = nullptr;
  int64_t position_ = 0;
  int64_t stop_ = 0;        // after the last visible key of the run
  int64_t left_ = 0;        // visible keys of this segment and batch element still to take
  bool continues_ = false;  // whether keys of other batch elements follow in this segment
  bool opens_ = true;       // whether nothing of the segment was taken yet
};

}  // namespace
}  // namespace dream::cpu
