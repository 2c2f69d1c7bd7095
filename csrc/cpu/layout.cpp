#include "layout.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace dream::cpu {
namespace {

struct Span {
  int64_t start;
  int64_t end;
  int64_t document;
};

constexpr int64_t kHighest = std::numeric_limits<int32_t>::max();

int64_t total_length(const Problem& p) { return p.prefix_length + p.local_length; }

int64_t position_of(const Problem& p, int64_t b, int64_t j) {
  return static_cast<const int64_t*>(
      p.positions.data)[b * p.positions.strides[0] + j * p.positions.strides[1]];
}

// The present documents of one batch element, by document.
std::vector<Span> read_spans(const Problem& p, int64_t b) {
  const auto* data = static_cast<const int64_t*>(p.spans.data);
  const int64_t* s = p.spans.strides;
  std::vector<Span> spans;
  for (int64_t c = 0; c < p.documents; ++c) {
    const int64_t start = data[b * s[0] + c * s[1]];
    const int64_t end = data[b * s[0] + c * s[1] + s[2]];
    if (start < 0 || end < start || end > total_length(p)) {
      throw std::invalid_argument("spans must satisfy 0 <= start <= end <= " +
                                  std::to_string(total_length(p)) + ", got spans[" +
                                  std::to_string(b) + ", " + std::to_string(c) + "] = [" +
                                  std::to_string(start) + ", " + std::to_string(end) + "]");
    }
    if (end > start) spans.push_back({start, end, c});
  }
  return spans;
}

// Appends the stretches of [begin, end) that are no padding for batch element b, and within which
// the group's window positions do not descend.
void append_runs(const Problem& p, const RowGroup& group, int64_t b, int64_t begin, int64_t end,
                 int64_t tag, std::vector<Run>* runs) {
  if (p.mask.data == nullptr && group.window_positions == nullptr) {
    if (end > begin) runs->push_back({begin, end, tag});
    return;
  }
  const auto* mask = static_cast<const uint8_t*>(p.mask.data);
  const int32_t* positions = group.window_positions;
  if (positions != nullptr) positions += (b - group.first_batch) * total_length(p);
  int64_t open = -1;
  for (int64_t j = begin; j < end; ++j) {
    const bool token =
        mask == nullptr || mask[b * p.mask.strides[0] + j * p.mask.strides[1]] != 0;
    const bool descends = positions != nullptr && j > begin && positions[j] < positions[j - 1];
    if ((!token || descends) && open >= 0) {
      runs->push_back({open, j, tag});
      open = -1;
    }
    if (token && open < 0) open = j;
  }
  if (open >= 0) runs->push_back({open, end, tag});
}

// Appends the stretches of [begin, end) that a group sees: several batch elements see those of the
// prefix together, and each its own local ones.
void append_runs(const Problem& p, const RowGroup& group, int64_t begin, int64_t end,
                 std::vector<Run>* runs) {
  const int64_t first = group.first_batch;
  if (group.batches == 1) return append_runs(p, group, first, begin, end, first, runs);
  append_runs(p, group, first, begin, std::min(end, p.prefix_length), kEveryBatch, runs);
  for (int64_t b = first; b < first + group.batches; ++b) {
    append_runs(p, group, b, std::max(begin, p.prefix_length), end, b, runs);
  }
}

int64_t round_up_lanes(int64_t rows) { return (rows + kLaneUnit - 1) / kLaneUnit * kLaneUnit; }

}  // namespace

Layout::Layout(const Problem& problem) : problem_(problem) {
  const int64_t group = problem.query_heads / problem.key_heads;
  const auto* receives = static_cast<const uint8_t*>(problem.heads.data);
  for (int64_t kv = 0; kv < problem.key_heads; ++kv) {
    // Each is read once: the caller's other threads may write to this memory.
    std::vector<int32_t> others;
    const size_t first = heads_.size();
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      const bool wanted = receives[h * problem.heads.strides[0]] != 0;
      (wanted ? heads_ : others).push_back(static_cast<int32_t>(h));
    }
    scored_heads_.push_back(static_cast<int64_t>(heads_.size() - first));
    heads_.insert(heads_.end(), others.begin(), others.end());
  }
  const int64_t merged = merged_batches();
  runs_.reserve(problem.batch);
  segments_.reserve(problem.batch);
  window_positions_.reserve(problem.batch);
  groups_.reserve(problem.batch);
  for (int64_t b = 0; b < problem.batch; b += merged) {
    add_group(b, std::min(merged, problem.batch - b));
  }
  first_numbers_.push_back(0);
  for (const RowGroup& g : groups_) {
    for (int64_t kv = 0; kv < problem.key_heads; ++kv) {
      const int64_t rows = row_count(g, kv, RowKind::kScored);
      first_numbers_.push_back(first_numbers_.back() + (rows + kMaxLanes - 1) / kMaxLanes);
    }
  }
}

// How many batch elements one row block takes in: few rows each, over one long prefix, fill the
// lanes together and read each of its keys once. The price is that every row passes over the local
// keys of all.
int64_t Layout::merged_batches() const {
  const Problem& p = problem_;
  const int64_t rows = p.query_heads / p.key_heads * p.rows;
  int64_t merged = std::min(p.batch, kMaxLanes / rows);
  if (p.local_length > 0) merged = std::min(merged, kMergedLocalKeys / p.local_length);
  if (merged < 2) return 1;
  const int64_t apart = merged * (p.prefix_length + p.local_length) * round_up_lanes(rows);
  const int64_t together =
      (p.prefix_length + merged * p.local_length) * round_up_lanes(merged * rows);
  return together < apart && share_keys() ? merged : 1;
}

// Whether all batch elements have the same documents, inside the same prefix at the same positions.
bool Layout::share_keys() const {
  const Problem& p = problem_;
  if (p.prefix_length == 0 || p.prefix_key.shape[0] != 1) return false;
  const std::vector<Span> documents = read_spans(p, 0);
  for (const Span& d : documents) {
    if (d.end > p.prefix_length) return false;
  }
  const auto same = [](const Span& a, const Span& b) {
    return a.start == b.start && a.end == b.end && a.document == b.document;
  };
  const auto* mask = static_cast<const uint8_t*>(p.mask.data);
  for (int64_t b = 1; b < p.batch; ++b) {
    const std::vector<Span> others = read_spans(p, b);
    if (!std::equal(documents.begin(), documents.end(), others.begin(), others.end(), same)) {
      return false;
    }
    for (int64_t j = 0; mask != nullptr && j < p.prefix_length; ++j) {
      const uint8_t* token = mask + j * p.mask.strides[1];
      if (token[0] != token[b * p.mask.strides[0]]) return false;
    }
    for (int64_t j = 0; p.positions.data != nullptr && j < p.prefix_length; ++j) {
      if (position_of(p, b, j) != position_of(p, 0, j)) return false;
    }
  }
  return true;
}

// Copies the window positions of a group's keys in numbers of 32 bits that compare as they do: what
// they are above the lowest or, where that is too much, their places in the order of all.
void Layout::add_window_positions(RowGroup* group) {
  const Problem& p = problem_;
  const int64_t length = total_length(p), count = group->batches * length;
  std::vector<int64_t> given(count);
  for (int64_t i = 0; i < count; ++i) {
    given[i] = position_of(p, group->first_batch + i / length, i % length);
  }
  std::vector<int64_t> order;
  int64_t lowest = 0, above = 0;
  if (count > 0) {
    const auto [low, high] = std::minmax_element(given.begin(), given.end());
    lowest = *low;
    if (__builtin_sub_overflow(*high, *low, &above) || above > kHighest) {
      order = given;
      std::sort(order.begin(), order.end());
    }
  }
  const auto narrow = [&](int64_t position) {
    if (order.empty()) return static_cast<int32_t>(position - lowest);
    const auto at = std::lower_bound(order.begin(), order.end(), position);
    return static_cast<int32_t>(at - order.begin());
  };
  std::vector<int32_t>& narrowed = window_positions_.emplace_back();
  narrowed.reserve(count + group->batches * p.rows);
  for (const int64_t position : given) narrowed.push_back(narrow(position));
  for (int64_t b = 0; b < group->batches; ++b) {
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t place = length - p.rows + row;
      int64_t first;
      if (place < 0) {
        narrowed.push_back(kHighest);
      } else if (__builtin_sub_overflow(given[b * length + place], p.window - 1, &first) ||
                 first < lowest) {
        narrowed.push_back(0);
      } else {
        narrowed.push_back(narrow(first));
      }
    }
  }
  group->window_positions = narrowed.data();
  group->reach = narrowed.data() + count;
}

// The lowest window position that a row sees; none at all before the first key.
int32_t Layout::reach_of(const RowGroup& group, int64_t batch, int64_t row) const {
  if (group.reach != nullptr) return group.reach[batch * problem_.rows + row];
  const int64_t place = total_length(problem_) - problem_.rows + row;
  return static_cast<int32_t>(place < 0 ? kHighest
                                        : std::max<int64_t>(place - (problem_.window - 1), 0));
}

void Layout::add_group(int64_t first_batch, int64_t batches) {
  RowGroup& group = groups_.emplace_back();
  group.first_batch = first_batch;
  group.batches = batches;
  if (problem_.window > 0 && problem_.positions.data != nullptr) add_window_positions(&group);
  const int64_t length = total_length(problem_);
  const std::vector<Span> documents = read_spans(problem_, first_batch);
  std::vector<Span> by_position = documents;
  std::sort(by_position.begin(), by_position.end(),
            [](const Span& a, const Span& c) { return a.start < c.start; });

  // Runs of each document, of the rest, of all keys; pointers are set once the vector is complete.
  std::vector<Run>& runs = runs_.emplace_back();
  std::vector<int64_t> bounds{0};
  for (const Span& d : documents) {
    append_runs(problem_, group, d.start, d.end, &runs);
    bounds.push_back(static_cast<int64_t>(runs.size()));
  }
  int64_t last_end = 0;
  for (const Span& d : by_position) {
    if (d.start < last_end) {
      throw std::invalid_argument("spans must be disjoint, but in batch element " +
                                  std::to_string(first_batch) + " document " +
                                  std::to_string(d.document) + " starts at " +
                                  std::to_string(d.start) + ", before another one ends at " +
                                  std::to_string(last_end));
    }
    append_runs(problem_, group, last_end, d.start, &runs);
    last_end = d.end;
  }
  append_runs(problem_, group, last_end, length, &runs);
  bounds.push_back(static_cast<int64_t>(runs.size()));
  append_runs(problem_, group, 0, length, &runs);
  bounds.push_back(static_cast<int64_t>(runs.size()));

  std::vector<Segment>& segments = segments_.emplace_back();
  int64_t documents_end = 0;  // 0 when no document is present
  for (size_t i = 0; i < documents.size(); ++i) {
    const int64_t count = bounds[i + 1] - bounds[i];
    if (count == 0) continue;  // a document of padding only counts as absent
    documents_end = std::max(documents_end, documents[i].end);
    segments.push_back({runs.data() + bounds[i], count, documents[i].document});
  }
  const size_t rest = documents.size();
  segments.push_back({runs.data() + bounds[rest], bounds[rest + 1] - bounds[rest],
                      problem_.documents});
  group.segments = segments.data();
  group.segment_count = static_cast<int64_t>(segments.size());
  group.all = {runs.data() + bounds[rest + 1], bounds[rest + 2] - bounds[rest + 1],
               problem_.documents};

  // Row m is at position T - M + m and is scored when that is at or past the last end.
  const int64_t first = documents_end - (length - problem_.rows);
  group.first_scored = documents_end == 0 ? problem_.rows
                       : problem_.causal  ? std::min(std::max<int64_t>(first, 0), problem_.rows)
                                          : 0;
}

int64_t Layout::row_count(const RowGroup& group, int64_t key_head, RowKind kind) const {
  const int64_t all = problem_.query_heads / problem_.key_heads * problem_.rows;
  const int64_t scored = scored_heads_[key_head] * (problem_.rows - group.first_scored);
  if (kind == RowKind::kScored) return group.batches * scored;
  return group.batches * (kind == RowKind::kPlain ? all - scored : all);
}

void Layout::append_row_blocks(int64_t group, int64_t key_head, RowKind kind,
                               std::vector<RowBlockIndex>* blocks) const {
  const int64_t count = row_count(groups_[group], key_head, kind);
  for (int64_t first = 0; first < count; first += kMaxLanes) {
    blocks->push_back({group, key_head, kind, first});
  }
}

void Layout::fill(const RowBlockIndex& index, RowBlock* block) const {
  const RowGroup& group = groups_[index.group];
  const int64_t heads = problem_.query_heads / problem_.key_heads;
  const int32_t* head_list = heads_.data() + index.key_head * heads;
  const int64_t scored = scored_heads_[index.key_head];
  const int64_t count = row_count(group, index.key_head, index.kind);
  const int64_t length = total_length(problem_);

  block->group = &group;
  block->key_head = index.key_head;
  block->kind = index.kind;
  block->length = length;
  block->windowed = problem_.window > 0;
  block->count = static_cast<int>(std::min<int64_t>(count - index.first, kMaxLanes));
  block->lanes = static_cast<int>(round_up_lanes(block->count));
  const int64_t targets = score_heads(index.key_head);
  block->targets = static_cast<int>(group.batches * targets);
  block->number = first_number(index.group, index.key_head) + index.first / kMaxLanes;
  for (int i = 0; i < block->count; ++i) {
    // Rows run before heads, so that a block's rows see nearly the same keys.
    int64_t r = (index.first + i) % (count / group.batches);
    int64_t row, head;
    if (index.kind == RowKind::kScored) {
      row = group.first_scored + r / scored;
      head = r % scored;
    } else if (index.kind == RowKind::kAll || r < group.first_scored * heads) {
      row = r / heads;
      head = r % heads;
    } else {
      r -= group.first_scored * heads;
      row = group.first_scored + r / (heads - scored);
      head = scored + r % (heads - scored);
    }
    const int64_t batch = (index.first + i) / (count / group.batches);
    block->batch[i] = static_cast<int32_t>(group.first_batch + batch);
    block->target[i] = static_cast<int32_t>(batch * targets + (targets == 1 ? 0 : head));
    block->row[i] = static_cast<int32_t>(row);
    block->head[i] = head_list[head];
    block->limit[i] = static_cast<int32_t>(
        problem_.causal ? std::max<int64_t>(length - problem_.rows + row, -1) : length - 1);
    if (block->windowed) block->reach[i] = reach_of(group, batch, row);
  }
  for (int i = block->count; i < block->lanes; ++i) {
    block->batch[i] = block->batch[block->count - 1];
    block->limit[i] = block->limit[block->count - 1];
    if (block->windowed) block->reach[i] = block->reach[block->count - 1];
  }
  block->min_limit = *std::min_element(block->limit, block->limit + block->lanes);
  block->max_limit = *std::max_element(block->limit, block->limit + block->lanes);
  if (!block->windowed) return;
  block->min_reach = *std::min_element(block->reach, block->reach + block->lanes);
  block->max_reach = *std::max_element(block->reach, block->reach + block->lanes);
}

}  // namespace dream::cpu
