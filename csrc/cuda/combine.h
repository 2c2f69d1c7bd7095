// Joins what splits left: a warp for each row walks over the splits in order.
#pragma once

#include "forward.h"
#include "rows.h"

namespace dream::cuda {

template <typename T, int D, int KIND>
struct Combine {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kShared = 0;
  static constexpr int kOwn = D / kWarp;  // elements of each lane, in pairs

  const Parameters& p;
  int b;
  Row row;
  float o[kOwn], whole[kOwn];
  float peak, total, documents;

  static DREAM_DEVICE int column(int i) { return i / 2 * 64 + lane_index() * 2 + i % 2; }

  DREAM_DEVICE const float* partial(int split, int place) const {
    return forward_partial<D>(p, b, row, split, place);
  }

  DREAM_DEVICE void open() {
    for (int i = 0; i < kOwn; ++i) o[i] = 0.0f;
    peak = -kInf;
    total = 0.0f;
  }

  DREAM_DEVICE void join(const float* from) {
    const float other = load(from + D), high = larger(peak, other);
    if (high == -kInf) return;
    const float own = exp2(peak - high), factor = exp2(other - high);
    peak = high;
    total = total * own + load(from + D + 1) * factor;
    DREAM_UNROLL for (int i = 0; i < kOwn; ++i) o[i] = o[i] * own + load(from + column(i)) * factor;
  }

  DREAM_DEVICE float log() const { return total > 0.0f ? peak + log2(total) : -kInf; }

  DREAM_DEVICE void save(int slot, float value) const {
    if (lane_index() == 0) store(state_of(p, b, row, slot), value);
  }

  DREAM_DEVICE void close_document(int d) {
    save(d, log());
    documents = add_logs(documents, log());
    const float w = load(p.weights + score_index(p, b, row, d));
    const float factor = total > 0.0f ? w / total : 0.0f;
    DREAM_UNROLL for (int i = 0; i < kOwn; ++i) whole[i] += factor * o[i];
    open();
  }

  DREAM_DEVICE void join_split(const Walk& walk, int split, bool one_segment) {
    if (walk.begin >= walk.end) return;
    if (one_segment) return join(partial(split, kEarlier));
    const Tile first = walk.tile(p, walk.begin), last = walk.tile(p, walk.end - 1);
    const bool continued = !(first.ends & kOpens);
    const bool same = continued && last.document == first.document;
    if (continued) {
      join(partial(split, kEarlier));
      if (!same || (last.ends & kCloses)) close_document(first.document);
    }
    const float* of_whole = partial(split, kWhole);
    documents = add_logs(documents, load(of_whole + D));
    DREAM_UNROLL for (int i = 0; i < kOwn; ++i) whole[i] += load(of_whole + column(i));
    if (!same && !(last.ends & kCloses)) join(partial(split, kOpen));
  }

  DREAM_DEVICE void finish(bool one_segment) const {
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    Shares shares{0.0f, 1.0f};
    if (one_segment) {
      save(p.slots - 1, log());
    } else {
      const float all = add_logs(documents, log());
      save(p.documents, log());
      save(p.documents + 1, documents);
      save(p.documents + 2, all);
      shares = shares_of(p, documents, log(), all);
    }
    auto* target = row_address<uint16_t>(p.output, b, row.head, row.m);
    DREAM_UNROLL for (int i = 0; i < kOwn; i += 2) {
      const float rest = shares.rest * inverse;
      store(reinterpret_cast<uint32_t*>(target + column(i)),
            pack<T>(shares.documents * whole[i] + rest * o[i],
                    shares.documents * whole[i + 1] + rest * o[i + 1]));
    }
  }

  static DREAM_DEVICE void run(const Parameters& p) {
    const int r = block_x() * kWarps + warp_index();
    Combine c{p, block_z(), {}, {}, {}, 0.0f, 0.0f, -kInf};
    const Counts counts = load(p.counts + c.b);
    c.row = row_of(p, block_y(), r, counts.first_scored);
    if (!c.row.valid) return;
    constexpr int kRows = Forward<T, D, KIND>::kRows;
    const int first = r / kRows * kRows;
    const bool scored = c.row.scored, one_segment = !scored || KIND == kBias;
    c.open();
    DREAM_ONCE for (int split = 0; split < p.splits; ++split) {
      Walk walk = Walk::of(p, c.b, counts, scored, largest_limit(p, first, first + kRows));
      walk.take_split(split, p.splits);
      c.join_split(walk, split, one_segment);
    }
    c.finish(one_segment);
  }
};

// The same of the backward, whose splits do not cut documents.
template <typename T, int D, int KIND>
struct Join {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kShared = 0;
  static constexpr int kOwn = D / kWarp;

  static DREAM_DEVICE void run(const Parameters& p) {
    const int64_t b = block_z();
    const Counts counts = load(p.counts + b);
    const Row row = row_of(p, block_y(), block_x() * kWarps + warp_index(), counts.first_scored);
    if (!row.valid) return;
    const bool by_document = row.scored && KIND == kReweight;
    float query[kOwn] = {}, shares[kOwn] = {}, mean = 0.0f, rest_mean = 0.0f;
    DREAM_ONCE for (int split = 0; split < p.splits; ++split) {
      const float* from = gradient_partial<D>(p, b, row, split);
      mean += load(from + 2 * D);
      rest_mean += load(from + 2 * D + 1);
      if (p.grad_query.data == nullptr) continue;
      DREAM_UNROLL for (int i = 0; i < kOwn; ++i) {
        query[i] += load(from + Combine<T, D, KIND>::column(i));
        if (by_document) shares[i] += load(from + D + Combine<T, D, KIND>::column(i));
      }
    }
    const int64_t at = slot_index(p, b, row, 1, 0);
    if (lane_index() == 0 && by_document) {
      store(p.numbers.mean + at, mean);
      const float rest = load(p.numbers.mass + at) - 1.0f;
      if (p.fixed_mass) store(p.numbers.rest_offset + at, rest * rest_mean);
    }
    if (p.grad_query.data == nullptr) return;
    auto* target = row_address<uint16_t>(p.grad_query, b, row.head, row.m);
    const float factor = by_document && !p.fixed_mass ? mean : 0.0f;
    DREAM_UNROLL for (int i = 0; i < kOwn; i += 2) {
      store(reinterpret_cast<uint32_t*>(target + Combine<T, D, KIND>::column(i)),
            pack<T>((query[i] + factor * shares[i]) * p.scale,
                    (query[i + 1] + factor * shares[i + 1]) * p.scale));
    }
  }
};

}  // namespace dream::cuda
