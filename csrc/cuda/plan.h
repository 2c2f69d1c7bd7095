// The plan of a call: lists of keys by segment, tiles of documents, and the scores' softmax.
//
// One block for each batch element. Spans that overlap or leave [0, T) are clamped: what comes out
// is then meaningless, and everything in it lies within memory.
#pragma once

#include "parameters.h"
#include "simt.h"

namespace dream::cuda {

constexpr int kPlanThreads = 256;
constexpr int kPlanShared = 256;

// The sum of `value` over this thread and those before it; `total` becomes that over the block.
DREAM_DEVICE int32_t block_scan(int32_t value, int32_t* total) {
  auto* sums = reinterpret_cast<int32_t*>(shared_memory());
  const int lane = lane_index(), warp = warp_index();
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t other = shuffle_up(value, delta);
    if (lane >= delta) value += other;
  }
  sync_threads();  // the sums of the call before were read
  if (lane == kWarp - 1) sums[warp] = value;
  sync_threads();
  *total = 0;
  int32_t before = 0;
  for (int w = 0; w < kPlanThreads / kWarp; ++w) {
    if (w == warp) before = *total;
    *total += sums[w];
  }
  return before + value;
}

struct Plan {
  const Parameters& p;
  int64_t b;
  int32_t* before;
  int32_t* keys;

  struct Span {
    int32_t begin, end;
  };

  DREAM_DEVICE Span span(int d) const {
    const int64_t* at = p.spans + (b * p.documents + d) * 2;
    const int64_t begin = load(at), end = load(at + 1), length = p.length;
    Span s;
    s.begin = static_cast<int32_t>(begin < 0 ? 0 : begin > length ? length : begin);
    s.end = static_cast<int32_t>(end < s.begin ? s.begin : end > length ? length : end);
    return s;
  }

  // How many documents begin, less how many end, at each position; their sum up to a position is
  // the number of documents that hold it.
  DREAM_DEVICE void mark() {
    for (int t = thread_index(); t <= p.length; t += kPlanThreads) store(before + t, 0);
    sync_threads();
    for (int d = thread_index(); d < p.documents; d += kPlanThreads) {
      const Span s = span(d);
      if (s.begin >= s.end) continue;
      atomic_add(before + s.begin, 1);
      atomic_add(before + s.end, -1);
    }
    sync_threads();
  }

  DREAM_DEVICE void list_keys(Counts* counts) {
    int32_t covering = 0, documents = 0, rest = 0, total;
    for (int first = 0; first < p.length; first += kPlanThreads) {
      const int t = first + thread_index();
      const bool inside = t < p.length;
      const int32_t covered = covering + block_scan(inside ? load(before + t) : 0, &total);
      covering += total;
      const bool token = inside && (p.mask == nullptr || load(p.mask + b * p.length + t) != 0);
      const int32_t in_document = token && covered > 0, in_rest = token && covered <= 0;
      // Both counts are below 2^16.
      const int32_t both = block_scan(in_document | in_rest << 16, &total);
      const int32_t d = documents + (both & 0xffff) - in_document, r = rest + (both >> 16) - in_rest;
      if (inside) store(before + t, d);
      if (in_document) store(keys + d, t);
      if (in_rest) store(keys + p.length + r, t);
      if (token) store(keys + 2 * static_cast<int64_t>(p.length) + d + r, t);
      documents += total & 0xffff;
      rest += total >> 16;
    }
    if (thread_index() == 0) store(before + p.length, documents);
    counts->document_keys = documents;
    counts->rest_keys = rest;
    sync_threads();
  }

  DREAM_DEVICE void list_tiles(Counts* counts) {
    int32_t listed = 0, total;
    Tile* tiles = p.tiles + b * p.tile_limit;
    int32_t last_end = 0;
    for (int first = 0; first < p.documents; first += kPlanThreads) {
      const int d = first + thread_index();
      const Span s = d < p.documents ? span(d) : Span{0, 0};
      const int32_t begin = load(before + s.begin), count = load(before + s.end) - begin;
      const int32_t own = (count + p.tile_keys - 1) / p.tile_keys;
      const int32_t at = listed + block_scan(own, &total) - own;
      for (int i = 0; i < own && at + i < p.tile_limit; ++i) {
        const int32_t done = i * p.tile_keys, left = count - done;
        store(tiles + at + i, Tile{begin + done, left < p.tile_keys ? left : p.tile_keys, d,
                                   (i == 0 ? kOpens : 0) | (i == own - 1 ? kCloses : 0)});
      }
      listed += total;
      if (s.begin < s.end && s.end > last_end) last_end = s.end;
    }
    counts->document_tiles = listed < p.tile_limit ? listed : p.tile_limit;
    for (int mask = 1; mask < kWarp; mask *= 2) {
      const int32_t other = shuffle_xor(last_end, mask);
      last_end = other > last_end ? other : last_end;
    }
    auto* ends = reinterpret_cast<int32_t*>(shared_memory());
    sync_threads();
    if (lane_index() == 0) ends[warp_index()] = last_end;
    sync_threads();
    for (int w = 0; w < kPlanThreads / kWarp; ++w) last_end = ends[w] > last_end ? ends[w] : last_end;
    const int32_t after = last_end - (p.length - p.rows);
    counts->first_scored = last_end == 0 ? p.rows
                           : !p.causal || after < 0 ? 0
                           : after < p.rows ? after
                                            : p.rows;
  }

  // One warp for each row of scores.
  DREAM_DEVICE void find_weights() {
    const int lane = lane_index();
    DREAM_ONCE for (int h = warp_index(); h < p.score_heads; h += kPlanThreads / kWarp) {
      const float* scores = p.scores + b * p.score_strides[0] + h * p.score_strides[1];
      float* weights = p.weights + (b * p.score_heads + h) * p.documents;
      float peak = -kInf, sum = 0.0f;
      for (int d = lane; d < p.documents; d += kWarp) {
        const Span s = span(d);
        if (s.begin < s.end) peak = larger(peak, load(scores + d * p.score_strides[2]));
      }
      for (int mask = 1; mask < kWarp; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
      if (peak == -kInf) peak = 0.0f;
      for (int d = lane; d < p.documents; d += kWarp) {
        const Span s = span(d);
        const float w = s.begin >= s.end ? 0.0f
                        : exp2((load(scores + d * p.score_strides[2]) - peak) * kLog2E);
        store(weights + d, w);
        sum += w;
      }
      for (int mask = 1; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      for (int d = lane; d < p.documents; d += kWarp) store(weights + d, load(weights + d) * inverse);
    }
  }

  static DREAM_DEVICE void run(const Parameters& p) {
    const int64_t b = block_x(), length = p.length;
    Plan plan{p, b, p.before + b * (length + 1), p.keys + b * 3 * length};
    Counts counts;
    plan.mark();
    plan.list_keys(&counts);
    plan.list_tiles(&counts);
    if (thread_index() == 0) store(p.counts + b, counts);
    plan.find_weights();
  }
};

}  // namespace dream::cuda
