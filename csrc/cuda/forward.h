// Forward: the output and, per row, the log-sum-exp of each segment. With `kMass` only the latter,
// for all rows as if they were scored.
//
// A block has 64 rows of one key head, 16 for each warp, and walks over the tiles of documents, each
// of which has a softmax of its own, and of the rest. Rows that are not scored walk over all keys.
#pragma once

#include "walk.h"

namespace dream::cuda {

enum Kind { kReweight, kBias, kMass };

// What of a scored row's output comes from the documents together, and from the rest.
struct Shares {
  float documents, rest;
};

DREAM_DEVICE Shares shares_of(const Parameters& p, float documents, float rest, float all) {
  if (all == -kInf) return {0.0f, 0.0f};
  if (!p.fixed_mass) return {exp2(documents - all), exp2(rest - all)};
  return rest == -kInf ? Shares{1.0f, 0.0f} : Shares{p.document_mass, 1.0f - p.document_mass};
}

// Places in `partial`: documents that lie in a split, a segment from an earlier split, one that
// continues in the next.
constexpr int kWhole = 0, kEarlier = 1, kOpen = 2, kPlaces = 3;

// Of a row, split and place: what is summed up, and two numbers.
template <int D>
DREAM_DEVICE float* forward_partial(const Parameters& p, int64_t b, const Row& row, int split,
                                    int place) {
  return p.partial + split_index(p, b, row, split * kPlaces + place) * (D + 2);
}

template <typename T, int D, int KIND>
struct Forward {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * 16;
  static constexpr int N = kTileKeys<D>;
  static constexpr int kQueryBytes = kRows * kRowBytes<D>;
  static constexpr int kWholeAt = kQueryBytes + Stages<D, kThreads>::kBytes;
  static constexpr int kShared = kWholeAt + (KIND == kReweight ? kRows * D * 4 : 0);
  using Sums = float[D / 8][4];

  const Parameters& p;
  int b;
  int key_head;
  int split;
  Row rows[2];
  Sums o;      // of the current segment, not normalised
  float peak[2], total[2];
  float documents[2];  // log-sum-exp of the documents

  // An element of the sum of w_d o_d, which only its own thread accesses.
  static DREAM_DEVICE float& whole(int n, int i) {
    return reinterpret_cast<float*>(shared_memory() + kWholeAt)[(n * 4 + i) * kThreads +
                                                                thread_index()];
  }

  DREAM_DEVICE void open() {
    clear(o);
    peak[0] = peak[1] = -kInf;
    total[0] = total[1] = 0.0f;
  }

  // Logits of a tile in base 2, -inf where a row does not see a key.
  DREAM_DEVICE void mask(float (&s)[N / 8][4], const Tile& tile, const int32_t* positions,
                         bool scored) const {
    const bool causal = p.causal && (!scored || KIND == kMass || tile.document == p.documents) &&
                        positions[tile.count - 1] > limit_of(p, 0);
    const float bias[2] = {bias_of(0, tile, scored), bias_of(1, tile, scored)};
    DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
      DREAM_UNROLL for (int i = 0; i < 4; ++i) s[n][i] = s[n][i] * p.log2_scale + bias[i / 2];
    }
    if (tile.count == N && !causal) return;
    const int last[2] = {causal ? rows[0].limit : p.length, causal ? rows[1].limit : p.length};
    DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
      DREAM_UNROLL for (int i = 0; i < 4; ++i) {
        const int column = fragment_column(n, i);
        const bool hidden = (column >= tile.count) | (positions[column] > last[i / 2]);
        s[n][i] = hidden ? -kInf : s[n][i];
      }
    }
  }

  DREAM_DEVICE float bias_of(int half, const Tile& tile, bool scored) const {
    if (KIND != kBias || !scored || tile.document == p.documents) return 0.0f;
    return log2_score(p, b, rows[half], tile.document);
  }

  DREAM_DEVICE void visit(const Tile& tile, Shared query, Shared key, Shared value,
                          const int32_t* positions, bool scored) {
    float s[N / 8][4];
    const int groups = (tile.count + 15) / 16;
    multiply_rows<T, D, N>(s, query, key, groups);
    mask(s, tile, positions, scored);
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      float high = peak[half];
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        high = larger(high, larger(s[n][2 * half], s[n][2 * half + 1]));
      }
      high = quad_max(high);
      const float base = high == -kInf ? 0.0f : high;
      const float factor = exp2(peak[half] - base);
      peak[half] = high;
      total[half] *= factor;
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2(s[n][i] - base);
          total[half] += s[n][i];
        }
      }
      if constexpr (KIND != kMass) {
        DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
          o[n][2 * half] *= factor;
          o[n][2 * half + 1] *= factor;
        }
      }
    }
    if constexpr (KIND != kMass) add_product<T, D, N>(o, s, value, groups);
  }

  DREAM_DEVICE float sum_log(int half) const {
    const float sum = quad_sum(total[half]);
    return sum > 0.0f ? peak[half] + log2(sum) : -kInf;
  }

  DREAM_DEVICE void save(int half, int slot, float value) const {
    if (lane_index() % 4 == 0) store(state_of(p, b, rows[half], slot), value);
  }

  DREAM_DEVICE void close_document(int d) {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(total[half]), log = sum_log(half);
      documents[half] = add_logs(documents[half], log);
      if (!rows[half].scored) continue;
      save(half, d, log);
      if constexpr (KIND == kReweight) {
        const float w = load(p.weights + score_index(p, b, rows[half], d));
        const float factor = sum > 0.0f ? w / sum : 0.0f;
        DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
          whole(n, 2 * half) += factor * o[n][2 * half];
          whole(n, 2 * half + 1) += factor * o[n][2 * half + 1];
        }
      }
    }
  }

  DREAM_DEVICE float* partial(int half, int place) const {
    return forward_partial<D>(p, opaque(b), rows[half], opaque(split), place);
  }

  DREAM_DEVICE void leave(int half, int place, const Sums& x, float first, float second) const {
    float* target = partial(half, place);
    DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
      store(target + fragment_column(n, 0), x[n][2 * half]);
      store(target + fragment_column(n, 1), x[n][2 * half + 1]);
    }
    if (lane_index() % 4 != 0) return;
    store(target + D, first);
    store(target + D + 1, second);
  }

  DREAM_DEVICE void leave_segment(int place, bool scored) const {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(total[half]);
      if (rows[half].valid && rows[half].scored == scored) leave(half, place, o, peak[half], sum);
    }
  }

  // Without splits: what the documents and the rest, the last segment, make together.
  DREAM_DEVICE void finish(bool scored) const {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(total[half]), log = sum_log(half);
      if (!rows[half].valid || rows[half].scored != scored) continue;
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      Sums y;
      float of_whole = 0.0f, of_rest = inverse;
      if (scored && KIND != kBias) {
        const float all = add_logs(documents[half], log);
        save(half, p.documents, log);
        save(half, p.documents + 1, documents[half]);
        save(half, p.documents + 2, all);
        const Shares shares = shares_of(p, documents[half], log, all);
        of_whole = shares.documents;
        of_rest = shares.rest * inverse;
      } else {
        save(half, p.slots - 1, log);
      }
      if constexpr (KIND != kMass) {
        DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
          DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
            y[n][i] = of_rest * o[n][i] + (KIND == kReweight ? of_whole * whole(n, i) : 0.0f);
          }
        }
        auto* target = row_address<uint16_t>(p.output, opaque(b), rows[half].head, rows[half].m);
        store_row<T, D>(target, y, half, 1.0f);
      }
    }
  }

  DREAM_DEVICE void pass(const Counts& counts, bool scored, int limit, Shared query,
                         Stages<D, kThreads> stages) {
    Walk walk = Walk::of(p, b, counts, scored, limit);
    walk.take_split(split, p.splits);
    const bool one_segment = !scored || KIND == kBias;
    const bool active = warp_has(rows, scored);
    open();
    if constexpr (KIND == kReweight) {
      DREAM_UNROLL for (int i = 0; i < D / 2; ++i) whole(i / 4, i % 4) = 0.0f;
    }
    documents[0] = documents[1] = -kInf;
    bool opened = false, left = false;  // a segment of this split, one from an earlier split
    walk_over<KIND != kMass>(p, b, key_head, walk, stages, [&](const Tile& tile, int stage, bool) {
      if (!active) return;
      if (!one_segment && (tile.ends & kOpens)) {
        open();
        opened = true;
      }
      visit(tile, query, stages.keys(stage), stages.values(stage), stages.positions(stage), scored);
      if (one_segment || !(tile.ends & kCloses)) return;
      if (opened || p.splits == 1) {
        close_document(tile.document);
      } else {
        leave_segment(kEarlier, scored);
        left = true;
      }
      open();
    });
    if (!active) return;
    if (p.splits == 1) return finish(scored);
    if (opened || !left) leave_segment(opened ? kOpen : kEarlier, scored);
    if (one_segment) return;
    if constexpr (KIND == kReweight) {
      DREAM_UNROLL for (int i = 0; i < D / 2; ++i) o[i / 4][i % 4] = whole(i / 4, i % 4);
      DREAM_UNROLL for (int half = 0; half < 2; ++half) {
        if (rows[half].scored) leave(half, kWhole, o, documents[half], 0.0f);
      }
    }
  }

  static DREAM_DEVICE void run(const Parameters& p) {
    const int block = block_x() / p.splits;
    Forward f{p, block_z(), block_y(), block_x() - block * p.splits, {}, {}, {}, {}, {}};
    const Counts counts = load(p.counts + f.b);
    const int first = block * kRows, first_scored = KIND == kMass ? 0 : counts.first_scored;
    char* queries = shared_memory();
    const Stages<D, kThreads> stages{queries + kQueryBytes};
    copy_rows<D, kRows, kThreads, false>(p, f.b, f.key_head, first, shared_address(queries), 0);
    commit_copies();
    const int own = warp_index() * 16 + lane_index() / 4;
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      f.rows[half] = row_of(p, f.key_head, first + own + 8 * half, first_scored);
      if (KIND == kMass) f.rows[half].scored = f.rows[half].valid;
    }
    Kinds kinds = kinds_of(p, f.key_head, first, first + kRows, first_scored);
    if (KIND == kMass) kinds = {true, false};
    const int limit = largest_limit(p, first, first + kRows);
    const Shared query = shared_address(queries) + warp_index() * 16 * kRowBytes<D>;
    DREAM_ONCE for (int plain = 0; plain < 2; ++plain) {
      if (plain ? kinds.plain : kinds.scored) f.pass(counts, !plain, limit, query, stages);
    }
  }
};

}  // namespace dream::cuda
